"""The classifier of unsafe images of four levels: Freepik/nsfw_image_detector, an EVA-02 of 448 pixels, in JAX.

The folder is a download of it: config.json and model.safetensors. Its authors call an image unsafe from P(medium) +
P(high) >= 0.5 on, which is what step 3 compares.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from lens_jax.convert import eva as convert_eva
from lens_jax.convert.folder import open_component, read_json
from lens_jax.convert.table import Tensors
from lens_jax.data.engine.scorers.on_devices import OnDevices
from lens_jax.data.engine.scorers.timm_transform import TimmTransform, read_transform
from lens_jax.errors import LensError
from lens_jax.models import eva
from lens_jax.models.eva import EvaConfig

LEVELS = ("neutral", "low", "medium", "high")
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class NsfwEva:
    """The loaded network."""

    transform: TimmTransform
    network: OnDevices
    name = "EVA-02, four levels (Freepik/nsfw_image_detector)"
    columns = ("nsfw",)

    @property
    def size(self) -> tuple[int, int]:
        return self.transform.size, self.transform.size

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """uint8 [448, 448, 3], resized as timm does; what is left of its transform is done on the device."""
        return self.transform.resize(image)

    def score(self, batch: np.ndarray) -> Mapping[str, np.ndarray]:
        """nsfw float32 [B, 4]: the probabilities of LEVELS."""
        return {"nsfw": self.network(batch)}


def load(folder: str, dtype: str) -> NsfwEva:
    """The network of a folder, computing in `dtype` (bfloat16 or float32) on all devices of this process.

    Raises LensError where the folder is not one of it: for a key of its config, or tensors that are missing, unknown,
    misshapen or not finite.
    """
    config, transform, tensors = _open(folder, dtype)
    leaves = convert_eva.leaves(config, tensors, str(Path(folder) / WEIGHTS))

    def probabilities(params: dict, pixels: jax.Array) -> jax.Array:
        return jax.nn.softmax(eva.apply(config, params, transform.normalise(pixels)))

    return NsfwEva(transform, OnDevices(probabilities, leaves, convert_eva.template(config)))


def fingerprint(folder: str) -> str:
    """sha256 of config and weights; LensError where the folder is not one of the network."""
    _open(folder, "float32")
    found = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (Path(folder) / name).open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _open(folder: str, dtype: str) -> tuple[EvaConfig, TimmTransform, Tensors]:
    """What a folder holds, after a look at its config and at the names and shapes of all tensors."""
    path = Path(folder)
    if not path.is_dir():
        raise LensError(
            f"models.nsfw: {folder!r:.200} is no folder; accepted: open_nsfw, empty, or a download of "
            f"Freepik/nsfw_image_detector with {CONFIG} and {WEIGHTS}"
        )
    where, values = str(path / CONFIG), read_json(path / CONFIG)
    config = convert_eva.config_from_release(values, where, dtype=dtype)
    pretrained = values.get("pretrained_cfg") or {}
    _check_levels(values, pretrained, config.classes, where)
    tensors = open_component(path / WEIGHTS)
    convert_eva.read(config, tensors, str(path / WEIGHTS))
    return config, read_transform(pretrained, config.image, where), tensors


def _check_levels(values: Mapping, pretrained: Mapping, classes: int, where: str) -> None:
    """LensError unless the classes are the levels, in their order; a file may call them by numbers alone."""
    if classes != len(LEVELS):
        raise LensError(f"{where}: num_classes is {classes}; accepted: 4, which are {', '.join(LEVELS)}")
    unnamed = [f"LABEL_{i}" for i in range(classes)]
    for key, names in (
        ("label_names", values.get("label_names")),
        ("pretrained_cfg.label_names", pretrained.get("label_names")),
        ("id2label", values.get("id2label")),
    ):
        names = [names.get(str(i)) for i in range(classes)] if isinstance(names, dict) else names
        if names not in (None, unnamed, list(LEVELS)):
            raise LensError(f"{where}: {key} is {names!r:.120}; accepted: {', '.join(LEVELS)}")
