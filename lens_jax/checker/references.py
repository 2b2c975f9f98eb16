"""What pictograms look like at the resolution of scenes: the references that `look.py` compares with.

All comparisons are of whole numbers, so that the same pixels give the same verdict on every machine. Where they go
through a matrix product of float64, every term and every partial sum is a whole number below 2^53, hence exact.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lens_jax.data.scenes import COLOURS
from lens_jax.data.sources import openmoji

# Pictograms are compared as means over CELLS x CELLS parts of the box around what is painted.
CELLS = 16
# Squared distance from the background, summed over the channels, from which a pixel counts as painted.
PAINTED = 40**2
# Sides at which pictograms are described: as one of four in a scene, and as one alone.
_SIDES = (22, 46)
# Side of the masters: as `data/sources/openmoji.py` draws them for images up to 80 pixels, four times the largest.
_MASTER = 320


@dataclass(frozen=True)
class Descriptors:
    """Every pictogram on one background, at each of _SIDES: R = sides x concepts rows."""

    # Means of the parts less the background, whole numbers: float64 [R, CELLS * CELLS * 3].
    values: np.ndarray
    # Their squared norms: int64 [R].
    norms: np.ndarray
    # Painted box (left, top, right, bottom) as parts of the square the pictogram is drawn in: float64 [R, 4].
    boxes: np.ndarray


class References:
    """The pictograms of some concepts, rendered as they are asked for and kept."""

    def __init__(self, ids: Sequence[str], masters: Mapping[str, object]):
        self.ids = tuple(ids)
        self.masters = masters
        self.sprite = functools.lru_cache(maxsize=8192)(self._sprite)
        self.descriptors = functools.lru_cache(maxsize=None)(self._descriptors)

    def _sprite(self, index: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Colour times alpha uint16 [side, side, 3], and 255 - alpha uint8 [side, side, 1]."""
        from PIL import Image

        image = self.masters[self.ids[index]].resize((side, side), Image.Resampling.LANCZOS)
        rgba = np.asarray(image).astype(np.uint16)
        return rgba[..., :3] * rgba[..., 3:], (255 - rgba[..., 3:]).astype(np.uint8)

    def composed(self, index: int, side: int, background: np.ndarray) -> np.ndarray:
        """int32 [side, side, 3]: the pictogram on a colour, int32 [3]."""
        colour, rest = self.sprite(index, side)
        return (colour.astype(np.int32) + rest * background + 127) // 255

    def _descriptors(self, background: str) -> Descriptors:
        colour = np.array(COLOURS[background], np.int32)
        values, boxes = [], []
        for side in _SIDES:
            for index in range(len(self.ids)):
                difference = self.composed(index, side, colour) - colour
                box = painted_box(np.square(difference).sum(-1) >= PAINTED)
                values.append(cell_means(integral(difference), np.array([box]))[0])
                boxes.append(np.array(box) / side)
        values = np.stack(values)
        return Descriptors(values.astype(np.float64), np.square(values).sum(1), np.stack(boxes))


@functools.cache
def load_references(count: int = len(openmoji.CONCEPTS)) -> References:
    """References for the first `count` concepts of OpenMoji; drawn once a process, in some seconds."""
    concepts = openmoji.load_concepts(count)
    return References([concept.id for concept in concepts], openmoji.load_sprites(concepts, _MASTER))


def painted_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """(left, top, right, bottom) around what is true in [H, W]; None where nothing is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def integral(values: np.ndarray) -> np.ndarray:
    """Sums over all that is above and to the left: int64 [H + 1, W + 1, C] of [H, W, C]."""
    sums = np.zeros((values.shape[0] + 1, values.shape[1] + 1, values.shape[2]), np.int64)
    np.cumsum(np.cumsum(values, 0, dtype=np.int64), 1, out=sums[1:, 1:])
    return sums


def cell_means(sums: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Means over CELLS x CELLS equal parts of each box: int64 [K, CELLS * CELLS * C], rounded.

    sums: `integral` [H + 1, W + 1, C]; boxes: int [K, 4]. A part ends between pixels, at a whole number of CELLS-ths of
    one, where the sums are interpolated: in whole numbers that is exact.
    """
    boxes = boxes.astype(np.int64)
    steps = np.arange(CELLS + 1)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    x, x_part = np.divmod(boxes[:, :1] * CELLS + width[:, None] * steps, CELLS)
    y, y_part = np.divmod(boxes[:, 1:2] * CELLS + height[:, None] * steps, CELLS)
    x_next, y_next = np.minimum(x + 1, sums.shape[1] - 1), np.minimum(y + 1, sums.shape[0] - 1)
    x, x_next, x_part = x[:, None, :], x_next[:, None, :], x_part[:, None, :, None]
    y, y_next, y_part = y[:, :, None], y_next[:, :, None], y_part[:, :, None, None]
    upper = sums[y, x] * (CELLS - x_part) + sums[y, x_next] * x_part
    lower = sums[y_next, x] * (CELLS - x_part) + sums[y_next, x_next] * x_part
    corners = upper * (CELLS - y_part) + lower * y_part
    totals = corners[:, 1:, 1:] - corners[:, :-1, 1:] - corners[:, 1:, :-1] + corners[:, :-1, :-1]
    # A part has width / CELLS x height / CELLS pixels, and the sums are of CELLS-ths in both directions.
    area = (width * height)[:, None, None, None]
    means = (2 * totals + area) // (2 * area)
    return means.reshape(len(boxes), -1)
