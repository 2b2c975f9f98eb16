"""Which network the vectors of near duplicates are of: CLIP ViT-L/14 of a release folder, as in the report, or the
descriptor `layout`, which needs no files and has a threshold of its own."""

from lens_jax.data.engine.scorers import layout
from lens_jax.data.engine.scorers.scorer import Scorer


def on_device(name: str) -> bool:
    """Whether it is in JAX, so that a process of it takes a device."""
    return bool(name) and name != layout.NAME


def fingerprint(name: str) -> str:
    """What identifies its weights."""
    if name == layout.NAME:
        return layout.fingerprint()
    from lens_jax.data.engine.scorers import clip

    return clip.fingerprint(name)


def load(name: str, dtype: str) -> Scorer:
    """The loaded network; also has `width`, the numbers of a vector. LensError where the folder is not one of it."""
    if name == layout.NAME:
        return layout.load()
    from lens_jax.data.engine.scorers import clip

    return clip.load(name, dtype)
