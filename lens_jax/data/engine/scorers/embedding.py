"""Which network the vectors of near duplicates are of: CLIP ViT-L/14 of a release folder, as in the report, or the
descriptor `layout`, which needs no files and has a threshold of its own."""

import importlib

from lens_jax.data.engine.scorers import layout
from lens_jax.data.engine.scorers.scorer import Scorer
from lens_jax.errors import LensError


def on_device(name: str) -> bool:
    """Whether it is in JAX, so that a process of it takes a device."""
    return bool(name) and name != layout.NAME


def fingerprint(name: str) -> str:
    """What identifies its weights."""
    if name == layout.NAME:
        return layout.fingerprint()
    return _clip().fingerprint(name)


def load(name: str, dtype: str) -> Scorer:
    """The loaded network; also has `width`, the numbers of a vector. LensError where the folder is not one of it."""
    if name == layout.NAME:
        return layout.load()
    return _clip().load(name, dtype)


def _clip():
    name = "lens_jax.data.engine.scorers.clip"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise LensError(
            f"models.embedding: this version has no network for it; accepted: empty, or {layout.NAME}"
        ) from None
