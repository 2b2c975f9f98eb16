"""What a release folder is: `model_index.json`, `transformer/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`.

The three variants (Lens, Lens-Turbo, Lens-Base) share every config and shape, and nothing in the folder names them, so
the variant is given by the caller or guessed from the path.
"""

import dataclasses
import math
import re
from pathlib import Path

from lens_jax.convert import folder
from lens_jax.errors import LensError, nearest

INDEX = "model_index.json"
# Its networks.
PARTS = ("transformer", "vae", "text_encoder")
# What a folder in our layout has.
MARK = "lens.json"
FORMAT = 1

MODEL_INDEX = {
    "_class_name": "LensPipeline",
    "_diffusers_version": "0.37.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "LensGptOssEncoder"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "LensTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}
# The pipeline reads none of it: it passes sigmas of its own.
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.37.1",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a variant of the release is sampled with (model card)."""

    num_inference_steps: int
    guidance_scale: float


VARIANTS = {"lens": Variant(20, 5.0), "turbo": Variant(4, 1.0), "base": Variant(50, 5.0)}


def is_release(path: Path) -> bool:
    """Whether `path` looks like a release folder in diffusers' layout, or a part of one: what a run is exported to."""
    return (path / INDEX).is_file() or any((path / name / "config.json").is_file() for name in PARTS)


def is_native(path: Path) -> bool:
    """Whether `path` is a folder in our layout."""
    return (path / MARK).is_file()


def metadata(variant: str) -> dict:
    """What `lens.json` says: the format, the variant, its default steps and guidance."""
    return {"format": FORMAT, "variant": variant, **dataclasses.asdict(VARIANTS[variant])}


def read_metadata(path: Path) -> tuple[str, Variant]:
    """The variant that a folder in our layout says it is, with the steps and guidance it says; LensError for others."""
    where = path / MARK
    values = folder.read_json(where)
    if values.get("format") != FORMAT:
        raise LensError(f"{where}: format is {values.get('format')!r:.80}; this version reads format {FORMAT}")
    variant = values.get("variant")
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise LensError(f"{where}: variant is {variant!r:.80}; accepted: {', '.join(VARIANTS)}")
    guidance = values.get("guidance_scale")
    if type(guidance) not in (int, float) or not math.isfinite(guidance):
        raise LensError(f"{where}: guidance_scale is {guidance!r:.80}; accepted: a number")
    return variant, Variant(folder.read_size(values, "num_inference_steps", str(where)), float(guidance))


# `Lens`, `models--X--Lens-Turbo`, `lens_base_mxfp8.safetensors`; not the name of this program.
_LENS = re.compile(r"(?<![a-z])lens(?=turbo|base|(?![a-z]|[-_. ]?jax))")
_OTHERS = re.compile(r"(?<![a-z])(?:lens)?(turbo|base)(?![a-z])")


def variant_of(path: Path, variant: str | None = None, said: str | None = None) -> str | None:
    """The variant asked for, or the one that a path speaks of; None where it cannot be known.

    The last part of the path that speaks of one decides; links are followed only where the path itself says nothing.
    `said` is what a config says it came from, asked last.
    """
    if variant is None:
        parts = [part for p in (path.absolute(), path.resolve()) for part in reversed(p.parts)]
        for i, part in enumerate([*parts, said or ""]):
            other, lens = _OTHERS.search(part.lower()), _LENS.search(part.lower())
            # A folder far above that is called `base` says nothing of the model.
            if other and (lens or i == 0):
                return other[1]
            if lens:
                return "lens"
        return None
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise LensError(f"variant {variant!r:.80}{nearest(str(variant), VARIANTS)}; accepted: {', '.join(VARIANTS)}")
    return variant
