"""What every text encoder gives: features for each prompt, and nothing for no prompt.

A text encoder is a frozen dataclass that says what its features depend on (`TextConfig`, tagged by its `kind` in JSON),
and what it loads (`TextEncoder`). A new one is a file here and a name in `kinds.Text`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from lens_jax.data.records import text_fault
from lens_jax.errors import LensError


class TextFeatures(NamedTuple):
    """Features of B prompts, right padded. The empty prompt of guidance and caption dropout is length 0."""

    # One float array [B, T, width] for each layer the denoiser reads.
    layers: tuple[np.ndarray, ...]
    # int32 [B], the valid tokens of each row.
    lengths: np.ndarray
    # The day the conversation around the prompts claimed to be, where there is one: another day gives other features.
    date: str | None = None


class TextInputs(NamedTuple):
    """B captions as the host hands them to the devices, right padded."""

    # [B, T] int32 ids of a model on the devices, or [B, T, width] float32 features made on the host. A model's captions
    # are whole: they are cut, and counted, where it is known how much room there is.
    values: np.ndarray
    # int32 [B], the valid tokens of each row.
    lengths: np.ndarray


class TextEncoder(Protocol):
    """What a `TextConfig` loads. Safe to call from several threads."""

    width: int
    num_layers: int

    # A digest of its weights; None for an encoder that comes with its package.
    digest: str | None

    @property
    def params(self) -> Any:
        """What `TextConfig.features` reads, on the devices."""

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of the prompts on the host; a blank prompt has length 0. LensError for a prompt that is not text.

        What was encoded before is kept, within bounds. On a mesh all processes must call it, with the same prompts.
        """

    def tokens(self, captions: Sequence[str]) -> TextInputs:
        """The host's part of training, for the reading threads: no device is touched."""


class TextConfig(Protocol):
    """A frozen dataclass with what the features of a caption depend on. Its methods are pure, but for `load`."""

    @property
    def width(self) -> int:
        """Channels of a feature layer."""

    @property
    def num_layers(self) -> int:
        """Feature layers a caption has."""

    @property
    def max_tokens(self) -> int:
        """The most tokens that training reads of a caption."""

    @property
    def suffix_tokens(self) -> int:
        """Tokens behind every caption, which must stay where one is cut."""

    @property
    def dtype(self) -> str:
        """Of the features."""

    def load(self, mesh: Mesh | None = None) -> TextEncoder:
        """The encoder, its weights laid out on the mesh where there is one."""

    def abstract_params(self, mesh: Any = None) -> Any:
        """Shapes, dtypes and, on a mesh, layouts of `TextEncoder.params`."""

    def abstract_inputs(self, captions: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of `TextInputs.values`."""

    def features(self, params: Any, values: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
        """The devices' part, for use inside a program: feature layers [B, T, width] of `TextInputs`.

        T may be less than `max_tokens`. On a mesh, which must be set, rows stay where they are.
        """

    def operations(self, tokens: int) -> int:
        """Of the devices' part for a caption of so many tokens, 2 a multiply-add."""


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as clean strings; LensError names the first that is not text."""
    if isinstance(prompts, str):
        raise LensError("prompts must be a list of strings, got one string")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise LensError(f"prompt {i} is {type(prompt).__name__}; a prompt must be text")
        if text_fault(prompt):
            raise LensError(f"prompt {i} holds bytes that are not text (NUL or broken UTF-8): {prompt[:40]!r}")
    return [prompt.strip() for prompt in prompts]
