"""What a scorer is: a network with its preprocessing."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np


class Scorer(Protocol):
    """Scores images in batches of a static shape. May also have `batch`, the images it takes at a time; those of the
    config otherwise."""

    # What it is, as the report page names it.
    name: str
    # The columns of tables.SCORE, or of tables.EMBED, that it gives.
    columns: tuple[str, ...]
    # Height and width of its input.
    size: tuple[int, int]

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Input of the network, of one shape, float32 or uint8, from a uint8 [H, W, 3] image in sRGB. From any
        thread."""

    def score(self, batch: np.ndarray) -> Mapping[str, np.ndarray]:
        """By column [B, ...] float32, of B inputs. The caller fills up the last batch and drops what it added."""
