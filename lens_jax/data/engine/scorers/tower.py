"""A vision transformer of a release folder: config.json, preprocessor_config.json, model.safetensors.

Folders are looked at whole before a run begins: sizes, names and shapes of all tensors, without reading a number.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lens_jax.convert import vit as convert
from lens_jax.convert.folder import read_json
from lens_jax.convert.table import Tensors, digest
from lens_jax.data.engine.scorers.on_devices import OnDevices
from lens_jax.data.engine.scorers.preprocessing import Preprocessing, read_preprocessing
from lens_jax.models import vit
from lens_jax.models.vit import Pool, VitConfig


@dataclass(frozen=True)
class Tower:
    """What a folder holds."""

    folder: Path
    # Of its config.json.
    values: dict[str, Any]
    config: VitConfig
    preprocessing: Preprocessing
    # Of the release by name, and our leaves by path.
    tensors: Tensors
    leaves: Tensors

    def network(self, finish: Callable[[jax.Array], jax.Array]) -> OnDevices:
        """uint8 pixels [B, side, side, 3] -> `finish` of what `models.vit` makes of them, float32 [B, result]."""
        config, preprocessing = self.config, self.preprocessing

        def function(params: dict, pixels: jax.Array) -> jax.Array:
            return finish(vit.apply(config, params, preprocessing.normalise(pixels)))

        return OnDevices(function, self.leaves, convert.template(config))

    def fingerprint(self, *more: str) -> str:
        """What its scores depend on: the weights, what it computes, and `more`."""
        depends = repr((digest(self.tensors), self.config, self.preprocessing, more))
        return hashlib.sha256(depends.encode()).hexdigest()


def open_tower(folder: str, pool: Pool, dtype: str = "float32") -> Tower:
    """A folder of a network of that kind; LensError where it is none, or is damaged."""
    path = Path(folder)
    tensors = convert.open_weights(path)
    values = read_json(path / "config.json")
    config = convert.config_from_release(values, str(path / "config.json"), pool, dtype=dtype)
    preprocessing = read_preprocessing(path, "crop" if pool == "class" else "squash", config.image)
    return Tower(path, values, config, preprocessing, tensors, convert.leaves(config, tensors, str(path)))


@dataclass(frozen=True)
class TowerScorer:
    """One column of numbers, behind the protocol of scorers."""

    name: str
    columns: tuple[str, ...]
    network: OnDevices
    preprocessing: Preprocessing

    @property
    def size(self) -> tuple[int, int]:
        return self.preprocessing.side, self.preprocessing.side

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """uint8 [side, side, 3]; what is left of the preprocessing is done on the device."""
        return self.preprocessing.resize(image)

    def score(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """float32 [B] or [B, n]."""
        (column,) = self.columns
        return {column: self.network(batch)}
