"""The near duplicates among the vectors of one cell.

`compare` gives all pairs above a cosine of which one has its home in the cell; what `cells.py` shows then makes the
pairs of all cells together those of all vectors. Whether a pair counts is decided in float64, so that neither the
matrix product's rounding nor the number of its threads can turn it.

A row's list of neighbours that come before it is cut off after `limit` in a cell, the first in the order of priority
stay: a thousand copies of one image have half a million pairs, of which a thousand decide. A list that was cut off is
named, since only one that has a kept neighbour in it is enough (see resolve.py). Rows whose lists are full are compared
no further, so the time such copies take grows with their number and not with its square.
"""

from typing import NamedTuple

import numpy as np

from lens_jax.data.engine.dedup.cells import unit_vectors

# A row's neighbours that come before it and are listed, a cell.
LIMIT = 256
# Rows that all others are compared with at a time, and numbers in a block of products.
_COLUMNS, _BLOCK = 256, 1 << 23
# Products of unit vectors in float32 are off by a few 1e-7: closer to the threshold than this float64 decides.
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
    vectors: np.ndarray,
    cosine: float,
    limit: int = LIMIT,
    only: np.ndarray | None = None,
) -> tuple[Pairs, np.ndarray]:
    """The pairs of a cell whose cosine is above `cosine`, and the keys of rows whose lists may be cut off.

    keys S [n], home bool [n], vectors float16 [n, D] of any length but 0. Of two rows one at least is at home. With
    `only`, bool [n], none but the lists of these rows.
    """
    order = np.argsort(keys)
    keys, home, vectors = keys[order], home[order], vectors[order]
    listed = np.ones(len(keys), bool) if only is None else only[order]
    cell = _Cell(vectors, cosine)
    counts = np.zeros(len(keys), np.int64)
    parts = []
    for start in range(0, len(keys) - 1, _COLUMNS):
        columns = np.arange(start, min(start + _COLUMNS, len(keys)))
        rows = start + np.flatnonzero((listed & (counts < limit))[start:])
        at_home = home[rows]
        # Those at home meet all, visitors meet those at home.
        for some, others in ((rows[at_home], columns), (rows[~at_home], columns[home[columns]])):
            if len(others):
                step = _BLOCK // len(others)
                blocks = (some[place : place + step] for place in range(0, len(some), step))
                parts += [cell.pairs(block, others, counts, limit) for block in blocks]
    first, second, value = (np.concatenate(column) for column in zip(*parts)) if parts else _NOTHING
    return Pairs(keys[first], keys[second], value), keys[counts >= limit]


class _Cell:
    """The vectors of a cell, in the order of priority."""

    def __init__(self, vectors: np.ndarray, cosine: float):
        self._vectors, self._cosine = vectors, cosine
        self._units = unit_vectors(vectors)
        self._lengths = np.sqrt(self._products(np.arange(len(vectors)), np.arange(len(vectors))))

    def pairs(self, rows: np.ndarray, columns: np.ndarray, counts: np.ndarray, limit: int):
        """(first, second, cosine) of the rows and of the columns that come before them; adds to `counts`."""
        products = self._units[rows] @ self._units[columns].T
        row, column = np.nonzero(products > self._cosine - _BAND)
        unsure = products[row, column] < self._cosine + _BAND
        row, column = rows[row], columns[column]
        valid = column < row
        row, column, unsure = row[valid], column[valid], unsure[valid]
        unsure[unsure] = self.cosines(row[unsure], column[unsure]) <= self._cosine  # now: below
        row, column = row[~unsure], column[~unsure]
        # Pairs are sorted by row, then by column: a pair's place in its row's list.
        starts = np.flatnonzero(np.concatenate([[True], row[1:] != row[:-1]])) if len(row) else np.empty(0, np.int64)
        lengths = np.diff([*starts, len(row)])
        place = counts[row] + np.arange(len(row)) - np.repeat(starts, lengths)
        counts[row[starts]] += lengths
        fits = place < limit
        row, column = row[fits], column[fits]
        return column, row, self.cosines(row, column).astype(np.float32)

    def cosines(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """In float64, the same for a pair wherever and beside whatever it is computed."""
        return self._products(a, b) / (self._lengths[a] * self._lengths[b])

    def _products(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        found = np.empty(len(a))
        for start in range(0, len(a), _PAIRS):
            some = slice(start, start + _PAIRS)
            x, y = self._vectors[a[some]].astype(np.float32), self._vectors[b[some]].astype(np.float32)
            found[some] = (x * y).sum(1, dtype=np.float64)  # a product of two float16 is exact in float32
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
