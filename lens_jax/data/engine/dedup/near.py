"""The near duplicates among the vectors of one cell.

`compare` gives all pairs above a cosine of which one has its home in the cell; what `cells.py` shows then makes the
pairs of all cells together those of all vectors. Short vectors (short.py) rule out nearly all pairs. Whether one of the
others counts is decided in float64, so that neither the matrix product's rounding nor the number of its threads can
turn it.

A row's list of neighbours that come before it is cut off after `limit` in a cell, the first in the order of priority
stay: a thousand copies of one image have half a million pairs, of which a thousand decide. A list that was cut off is
named, since only one that has a kept neighbour in it is enough (see resolve.py). Rows whose lists are full are compared
no further, so the time such copies take grows with their number and not with its square.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# A row's neighbours that come before it and are listed, a cell.
LIMIT = 256
# Rows that all others are compared with at a time, and numbers in a block of products.
_COLUMNS, _BLOCK = 256, 1 << 21
# Products of unit vectors in float32 are off by a few 1e-7.
_BAND = 1e-5
# Pairs whose cosine is computed at a time.
_PAIRS = 1 << 14


class Pairs(NamedTuple):
    """Near duplicates, as keys (see priority.py)."""

    # The one that comes first, the other, and their cosine in float32, [n] each.
    first: np.ndarray
    second: np.ndarray
    cosine: np.ndarray


def compare(
    keys: np.ndarray,
    home: np.ndarray,
    short: np.ndarray,
    whole: Callable[[np.ndarray], np.ndarray],
    cosine: float,
    limit: int = LIMIT,
    only: np.ndarray | None = None,
) -> tuple[Pairs, np.ndarray]:
    """The pairs of a cell whose cosine is above `cosine`, and the keys of rows whose lists may be cut off.

    keys S [n], home bool [n], short float32 [n, d] (see short.py). whole: places int64 [m] in these arrays to vectors
    float16 [m, D] of any length but 0. Of two rows one at least is at home. With `only`, bool [n], none but the lists
    of these rows.
    """
    order = np.argsort(keys)
    keys, home, short = keys[order], home[order], short[order]
    cell = _Cell(short, lambda places: whole(order[places]), cosine)
    listed = np.ones(len(keys), bool) if only is None else only[order]
    counts = np.zeros(len(keys), np.int64)
    parts = []
    # Those at home meet all, visitors meet those at home.
    for group, others in ((home, np.arange(len(keys))), (~home, np.flatnonzero(home))):
        for start in range(0, len(others), _COLUMNS):
            columns = others[start : start + _COLUMNS]
            after = columns[0] + 1
            rows = after + np.flatnonzero((group & listed & (counts < limit))[after:])
            step = _BLOCK // len(columns)
            blocks = (rows[place : place + step] for place in range(0, len(rows), step))
            parts += [cell.pairs(block, columns, counts, limit) for block in blocks]
    first, second, value = (np.concatenate(column) for column in zip(*parts)) if parts else _NOTHING
    return Pairs(keys[first], keys[second], value), keys[counts >= limit]


class _Cell:
    """The vectors of a cell, in the order of priority."""

    def __init__(self, short: np.ndarray, whole: Callable[[np.ndarray], np.ndarray], cosine: float):
        self._short, self._whole, self._cosine = short, whole, cosine

    def pairs(self, rows: np.ndarray, columns: np.ndarray, counts: np.ndarray, limit: int):
        """(first, second, cosine) of the rows and of the columns that come before them; adds to `counts`."""
        products = self._short[rows] @ self._short[columns].T
        row, column = np.divmod(np.flatnonzero(products > self._cosine - _BAND), len(columns))
        row, column = rows[row], columns[column]
        valid = column < row
        row, column = row[valid], column[valid]
        value = self.cosines(row, column)
        above = value > self._cosine
        row, column, value = row[above], column[above], value[above]
        # Pairs are sorted by row, then by column: a pair's place in its row's list.
        starts = np.flatnonzero(np.concatenate([[True], row[1:] != row[:-1]])) if len(row) else np.empty(0, np.int64)
        lengths = np.diff([*starts, len(row)])
        place = counts[row] + np.arange(len(row)) - np.repeat(starts, lengths)
        counts[row[starts]] += lengths
        fits = place < limit
        return column[fits], row[fits], value[fits].astype(np.float32)

    def cosines(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """In float64, the same for a pair wherever and beside whatever it is computed."""
        found = np.empty(len(a))
        for start in range(0, len(a), _PAIRS):
            some = slice(start, start + _PAIRS)
            places, number = np.unique(np.concatenate([a[some], b[some]]), return_inverse=True)
            x, (i, j) = self._whole(places).astype(np.float32), np.split(number, 2)
            # A product of two float16 is exact in float32.
            dot = lambda i, j, x=x: (x[i] * x[j]).sum(1, dtype=np.float64)
            lengths = np.sqrt(dot(slice(None), slice(None)))
            found[some] = dot(i, j) / (lengths[i] * lengths[j])
        return found


_NOTHING = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)


def distinct(parts: list[Pairs]) -> Pairs:
    """The pairs of all parts, each once, sorted."""
    first, second, value = (np.concatenate(column) for column in zip(*parts))
    order = np.lexsort((second, first))
    first, second, value = first[order], second[order], value[order]
    new = np.ones(len(first), bool)
    new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return Pairs(first[new], second[new], value[new])
