"""What every text encoder gives: features for each prompt, and nothing for no prompt."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lens_jax.errors import LensError


class TextFeatures(NamedTuple):
    """Features of B prompts, right padded. The empty prompt of guidance and caption dropout is length 0."""

    # One float array [B, T, width] for each layer the denoiser reads.
    layers: tuple[np.ndarray, ...]
    # int32 [B], the valid tokens of each row.
    lengths: np.ndarray
    # The day the conversation around the prompts claimed to be, where there is one: another day gives other features.
    date: str | None = None


class TextEncoder(Protocol):
    """Turns prompts into features. Implementations cache: the same prompt is encoded once."""

    @property
    def width(self) -> int:
        """Channels of a feature layer."""

    @property
    def num_layers(self) -> int:
        """Feature layers a prompt has."""

    @property
    def max_tokens(self) -> int:
        """T of every result: one static shape, so nothing recompiles for a longer prompt."""

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of the prompts; a blank prompt has length 0. LensError for a prompt that is not text."""


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as clean strings; LensError names the first that is not text."""
    if isinstance(prompts, str):
        raise LensError("prompts must be a list of strings, got one string")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise LensError(f"prompt {i} is {type(prompt).__name__}; a prompt must be text")
        if "\x00" in prompt or any(0xD800 <= ord(c) <= 0xDFFF for c in prompt):
            raise LensError(f"prompt {i} holds bytes that are not text (NUL or broken UTF-8): {prompt[:40]!r}")
    return [prompt.strip() for prompt in prompts]
