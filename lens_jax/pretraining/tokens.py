"""How many tokens the rows of a batch have: image tokens with their padding, and room for text by caption length."""

import functools
import math
import threading
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lens_jax.data.buckets import areas
from lens_jax.data.mixture import Shape
from lens_jax.errors import LensError, LensWarning
from lens_jax.models.latent_grid import latent_grid
from lens_jax.models.layers import joint_positions
from lens_jax.pretraining.config import TrainConfig


class Tokens(NamedTuple):
    """How many tokens the rows of a shape's batches have."""

    # Rows and columns of latent tokens.
    grid: tuple[int, int]
    # Latent tokens with their padding.
    padded: int
    # Room for the tokens of a caption.
    text: int

    @property
    def image(self) -> int:
        return math.prod(self.grid)


def token_counts(config: TrainConfig, shapes: Sequence[Shape], sequence: int = 1) -> dict[Shape, Tokens]:
    """Tokens of every shape on a mesh whose axis `sequence` has so many devices.

    With `data.pad_areas` all buckets of an area have as many image tokens as the one with the most. The room for text
    is what the class of caption lengths says, or `text.max_tokens` where that is less or there is no class; with
    `data.joint_multiple` it is then widened until image and text together are a multiple of it.
    """
    buckets = list(dict.fromkeys(shape.bucket for shape in shapes))
    grids = {bucket: latent_grid(config.codec, bucket.height, bucket.width) for bucket in buckets}
    # In pixels: what an area is does not depend on how many of them make a token.
    area = dict(zip(buckets, areas(buckets, tile=1)))
    most = {a: max(math.prod(grids[b]) for b in buckets if area[b] == a) for a in area.values()}
    counts = {}
    for shape in shapes:
        padded = math.prod(grids[shape.bucket])
        if config.data.pad_areas:
            padded = _round_up(most[area[shape.bucket]], sequence)
        elif padded % sequence:
            raise LensError(
                f"mesh.sequence {sequence} does not divide the {padded} image tokens of {shape.bucket}; set "
                "data.pad_areas"
            )
        text = _room(config, padded, shape.text_class, sequence)
        counts[shape] = Tokens(grids[shape.bucket], padded, text)
    return counts


def _room(config: TrainConfig, padded: int, text_class: int, sequence: int) -> int:
    """The least room for captions of a class beside so many image tokens."""
    text = _round_up(min(text_class or config.text.max_tokens, config.text.max_tokens), sequence)
    # This ends: `sequence` divides the image tokens.
    while (padded + text) % config.data.joint_multiple:
        text += sequence
    return text


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@functools.cache
def positions(tokens: Tokens) -> np.ndarray:
    """int32 [padded + text, 3]: positions of the grid, of its padding, and of the text."""
    joint = joint_positions(*tokens.grid, tokens.text)
    padding = np.zeros((tokens.padded - tokens.image, 3), np.int32)
    return np.concatenate([joint[: tokens.image], padding, joint[tokens.image :]])


def fit_text(values: np.ndarray, lengths: np.ndarray, room: int, behind: int) -> np.ndarray:
    """Captions [B, T] or [B, T, width] of these lengths to [B, room]; the last `behind` tokens of each are always kept.

    They are what stands behind every caption, so one that is too long is cut at its own end.
    """
    behind = min(behind, room)
    fitted = np.zeros((len(values), room, *values.shape[2:]), values.dtype)
    width = min(room, values.shape[1])
    fitted[:, :width] = values[:, :width]
    for row in np.flatnonzero(lengths > room):
        fitted[row, room - behind :] = values[row, lengths[row] - behind : lengths[row]]
    return fitted


class CutCaptions:
    """Counts captions that were longer than their room, and says so ever more seldom. Safe to share between threads."""

    def __init__(self):
        self.cut, self.seen = 0, 0
        self._next = 1
        self._lock = threading.Lock()

    def add(self, cut: int, seen: int) -> None:
        """So many captions of so many were cut; warns at the first one, and each time there are ten times as many."""
        with self._lock:
            self.cut, self.seen = self.cut + cut, self.seen + seen
            if self.cut < self._next:
                return
            self._next = 10 ** len(str(self.cut))
            message = f"{self.cut} of {self.seen} captions so far did not fit into the room for text and lost their end"
        warnings.warn(message, LensWarning, stacklevel=2)
