"""Written words, read from pixels: squares of letters are laid over the ink so that they explain it best.

Reading is by template and knows no words, since half of those that scenes show are letters at random.
"""

import functools
import itertools
import math
import string
from dataclasses import dataclass

import numpy as np

from lens_jax.data import lettering
from lens_jax.data.scene_sampler import GRID

LETTERS = string.ascii_uppercase
# Sides of a letter's square in scenes.
SIDES = (GRID, 2 * GRID)


@dataclass(frozen=True)
class Reading:
    """What ink says."""

    text: str
    font: str
    # Squared difference from the ink of that text, summed over the pixels, in units of 1 / 255^2 pixels.
    cost: int


def read(ink: np.ndarray) -> Reading | None:
    """The word whose letters explain the ink best; None where it is too small or too large for one.

    ink: int [H, W], 0 to 255, a box that touches the ink on all sides.
    """
    height, width = ink.shape
    readings = [
        _reading(ink, side, font, down, right)
        for side in SIDES
        if side // 2 < height <= side + 1
        for font in lettering.FONTS
        # How far the ink is below the upper side of its squares, and right of the first one's left side. An I in the
        # middle of its square is the farthest.
        for down, right in itertools.product(range(side // 4 + 1), range(side // 2 + 1))
        if width + right <= 12 * side
    ]
    return min(readings, key=lambda reading: reading.cost, default=None)


def _reading(ink: np.ndarray, side: int, font: str, down: int, right: int) -> Reading:
    """The letters that explain the ink best if it lies so in its squares."""
    width = ink.shape[1]
    count = math.ceil((width + right) / side)
    canvas = np.zeros((side, count * side), np.int64)
    inside = ink[: side - down]
    canvas[down : down + len(inside), right : right + width] = inside
    squares = canvas.reshape(side, count, side).swapaxes(0, 1).reshape(count, -1)
    # Below 2^53 everything is exact in float64, which numpy multiplies faster than integers.
    templates = _templates(font, side)
    costs = np.square(templates).sum(1) - 2 * (squares.astype(np.float64) @ templates.T)
    letters = costs.argmin(1)
    explained = int(costs[np.arange(count), letters].sum())
    total = int(np.square(ink.astype(np.int64)).sum())
    return Reading("".join(LETTERS[letter] for letter in letters), font, total + explained)


@functools.cache
def _templates(font: str, side: int) -> np.ndarray:
    """The letters' squares, float64 [26, side * side] of whole numbers."""
    return np.stack([np.asarray(lettering.letters(letter, font, side), np.float64).ravel() for letter in LETTERS])
