"""What a release folder is: `model_index.json`, `transformer/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`.

The three variants (Lens, Lens-Turbo, Lens-Base) share every config and shape, and nothing in the folder names them, so
the variant is given by the caller or guessed from the folder's name.
"""

import dataclasses
from pathlib import Path

from lens_jax.errors import LensError, nearest

INDEX = "model_index.json"


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a variant of the release is sampled with (model card)."""

    num_inference_steps: int
    guidance_scale: float


VARIANTS = {"lens": Variant(20, 5.0), "turbo": Variant(4, 1.0), "base": Variant(50, 5.0)}


def is_release(path: Path) -> bool:
    """Whether `path` looks like a release folder in diffusers' layout."""
    return (path / INDEX).is_file()


def variant_of(path: Path, variant: str | None = None) -> str:
    """The variant asked for, or the one the folder's name speaks of; Lens itself where it names none."""
    if variant is None:
        name = path.resolve().name.lower()
        return next((v for v in ("turbo", "base") if v in name), "lens")
    if variant not in VARIANTS:
        raise LensError(f"variant {variant!r}{nearest(variant, VARIANTS)}; accepted: {', '.join(VARIANTS)}")
    return variant
