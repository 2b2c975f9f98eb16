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
# Letters of a word.
_LONGEST = 12


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
    height = ink.shape[0]
    readings = [_reading(ink, side) for side in SIDES if side // 2 < height <= side + 1]
    return min((one for one in readings if one), key=lambda reading: reading.cost, default=None)


def _reading(ink: np.ndarray, side: int) -> Reading | None:
    """The best of all fonts and all places that the ink can have in squares of this side; of the same, the first."""
    width = ink.shape[1]
    # How far the ink is below the upper side of its squares, and right of the first one's left side. An I in the middle
    # of its square is the farthest.
    places = [
        (down, right)
        for down, right in itertools.product(range(side // 4 + 1), range(side // 2 + 1))
        if width + right <= _LONGEST * side
    ]
    if not places:
        return None
    counts = np.array([math.ceil((width + right) / side) for _, right in places])
    most = counts.max()
    canvas = np.zeros((len(places), side, most * side))
    for page, (down, right) in zip(canvas, places):
        page[down : down + len(ink), right : right + width] = ink[: side - down]
    squares = canvas.reshape(len(places), side, most, side).swapaxes(1, 2).reshape(-1, side * side)
    # Below 2^53 everything is exact in float64, which numpy multiplies faster than integers.
    templates, norms = _templates(side)
    costs = (norms - 2 * (squares @ templates.T)).reshape(len(places), most, len(lettering.FONTS), len(LETTERS))
    letters = costs.argmin(-1)
    explained = np.take_along_axis(costs, letters[..., None], -1)[..., 0]
    explained = (explained * (np.arange(most) < counts[:, None])[..., None]).sum(1)
    font, place = divmod(int(explained.T.argmin()), len(places))
    text = "".join(LETTERS[letter] for letter in letters[place, : counts[place], font])
    total = int(np.square(ink.astype(np.int64)).sum())
    return Reading(text, list(lettering.FONTS)[font], total + int(explained[place, font]))


@functools.cache
def _templates(side: int) -> tuple[np.ndarray, np.ndarray]:
    """The letters' squares of all fonts, float64 [26 fonts, side * side] of whole numbers, and their squared norms."""
    squares = [lettering.letters(letter, font, side) for font in lettering.FONTS for letter in LETTERS]
    values = np.stack([np.asarray(square, np.float64).ravel() for square in squares])
    return values, np.square(values).sum(1)
