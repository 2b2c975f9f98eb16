"""Arguments of a pipeline's call: those of other pipelines that are none here, by name, and the types of its own."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lens_jax.errors import LensError, nearest

# Arguments of diffusers' pipelines and of the release's that are not ours, and what to do instead; docs/checkpoints.md
# has ours beside them. None, which is the default of most, is accepted for all.
OTHERS = {
    "generator": "random numbers of PyTorch differ from JAX's; give seed=, or latents= drawn with it",
    "sigmas": "the schedule follows from the size and num_inference_steps",
    "timesteps": "the schedule follows from the size and num_inference_steps",
    "max_sequence_length": "the text encoder cuts prompts at 512 tokens of conversation, as the release does",
    "callback_on_step_end": "the steps are one compiled program; progress= is called after each batch",
    "callback_on_step_end_tensor_inputs": "the steps are one compiled program; progress= is called after each batch",
    "callback": "the steps are one compiled program; progress= is called after each batch",
    "callback_steps": "the steps are one compiled program; progress= is called after each batch",
    "attention_kwargs": "a scale goes to load_lora_weights, and there are no attention processors",
    "joint_attention_kwargs": "a scale goes to load_lora_weights, and there are no attention processors",
    "cross_attention_kwargs": "a scale goes to load_lora_weights, and there are no attention processors",
    "true_cfg_scale": "guidance is guidance_scale here",
    "guidance": "guidance is guidance_scale here",
    "guidance_rescale": "guidance is always rescaled to the norm of the conditional velocity, as in the release",
    "eta": "Euler's steps are deterministic",
    "clip_skip": "there is no CLIP here",
    "prompt_2": "there is one text encoder; give prompt=",
    "negative_prompt_2": "there is one text encoder; give negative_prompt=",
    "pooled_prompt_embeds": "Lens reads no pooled text",
    "negative_pooled_prompt_embeds": "Lens reads no pooled text",
    "prompt_embeds_mask": "prompt_embeds= is a TextFeatures, which has the lengths",
    "negative_prompt_embeds_mask": "negative_prompt_embeds= is a TextFeatures, which has the lengths",
    "prompt_attention_mask": "prompt_embeds= is a TextFeatures, which has the lengths",
    "negative_prompt_attention_mask": "negative_prompt_embeds= is a TextFeatures, which has the lengths",
    "image": "it draws from noise alone",
    "mask_image": "it draws from noise alone",
    "strength": "it draws from noise alone",
}


def refuse(others: Mapping[str, Any], known: list[str]) -> None:
    """LensError for an argument of another pipeline, or of none."""
    for name, value in others.items():
        if name not in OTHERS:
            raise LensError(f"{name}{nearest(name, known)} is no argument; accepted: {', '.join(known)}")
        if value is not None:
            raise LensError(f"{name} is no argument here: {OTHERS[name]}")


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least `least`."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise LensError(f"{name} is {value!r:.60}; it must be a whole number")
    if value < least:
        raise LensError(f"{name} is {value}; it must be at least {least}")
    return int(value)


def number(name: str, value: Any) -> float:
    """A finite number."""
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not real or not math.isfinite(value):
        raise LensError(f"{name} is {value!r:.60}; it must be a finite number")
    return float(value)


def choice(name: str, value: Any, accepted) -> Any:
    if not isinstance(value, str) or value not in accepted:
        raise LensError(f"{name} is {value!r:.60}; accepted: {', '.join(accepted)}")
    return value


def array(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Finite float32 numbers of this shape."""
    try:
        numbers = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise LensError(f"{name} is {type(value).__name__}; it must be an array of numbers {list(shape)}") from None
    if numbers.shape != shape:
        raise LensError(f"{name} are {list(numbers.shape)}; this call needs {list(shape)}")
    if not np.isfinite(numbers).all():
        raise LensError(f"{name}: {int((~np.isfinite(numbers)).sum())} of the numbers are not finite")
    return numbers
