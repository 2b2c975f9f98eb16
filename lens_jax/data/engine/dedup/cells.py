"""Cells: which vectors have to be compared with each other.

Every vector has a home, the cell whose centroid c gives it the largest product x.c, and is sent to further cells j as
well where it lies near the border: home.x - c_j.x <= reach ||c_j - home||. If ||x - y|| <= r, then

    y.(c_h(y) - c_h(x)) <= (y - x).(c_h(y) - c_h(x)) <= r ||c_h(y) - c_h(x)||,

the first step because x.(c_h(y) - c_h(x)) <= 0. So with reach = r, every y within r of x is sent to the home of x: each
vector, compared with all that is in its home, meets all its neighbours, for any centroids. Unit vectors of cosine t are
sqrt(2 - 2t) apart. A smaller reach loses some and sends less.

Two vectors that are at home in different cells need to meet in one of the two, so each is sent to cells of a lower
number than its home's alone: that is half of the copies, and every pair is found once.

Cells that would hold too many vectors are divided by centroids of their own under the same rule, so they form a tree.
"""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lens_jax.atomic import writing
from lens_jax.errors import LensError

# Numbers in a block of products, 128 MB in float32.
_BLOCK = 1 << 25
# Up to so many centroids the distances between all are kept.
_KEPT_DISTANCES = 8192
# Rounding may only send more: products of unit vectors in float32 are off by a few 1e-7.
_SLACK = 1e-5
# Vectors that centroids are chosen from: at least so many, and so many for each.
SAMPLE, SAMPLE_EACH = 1 << 15, 16
_LLOYD_STEPS = 2
# A cell is divided at most so often, and only where that helps.
_DEPTH = 4
# How many times `max_cell` a cell may hold with its visitors.
_VISITORS = 8


class Placed(NamedTuple):
    """Vectors in cells, sorted by vector."""

    # Which vector, int64 [m], and its cell, int64 [m].
    row: np.ndarray
    cell: np.ndarray
    # Whether that is its home, bool [m].
    home: np.ndarray


@dataclasses.dataclass(frozen=True)
class Cells:
    """The tree of centroids."""

    # float32 [T, D]; centroids of one parent lie together.
    centroids: np.ndarray
    # The cell that each divides, int64 [T]; -1 for those of the root. A cell is named by the number of its centroid.
    parent: np.ndarray

    def place(self, vectors: np.ndarray, reach: float) -> Placed:
        """The cells that unit vectors float32 [n, D] are compared in; `reach` is a distance."""
        parts = []
        below = {-1: Placed(np.arange(len(vectors)), np.full(len(vectors), -1), np.ones(len(vectors), bool))}
        while below:
            found = {}
            for parent, those in below.items():
                children = self._children[parent]
                apart = self._distances(parent)
                inside = _place(vectors[those.row], those.home, self.centroids[children], reach, apart)
                placed = Placed(
                    those.row[inside.row], children.start + inside.cell, inside.home & those.home[inside.row]
                )
                divided = np.isin(placed.cell, list(self._children))
                parts.append(Placed(*(column[~divided] for column in placed)))
                for cell in np.unique(placed.cell[divided]):
                    found[int(cell)] = Placed(*(column[placed.cell == cell] for column in placed))
            below = found
        row, cell, home = (np.concatenate(column) for column in zip(*parts))
        order = np.lexsort((cell, row))
        return Placed(row[order], cell[order], home[order])

    @functools.cached_property
    def _children(self) -> dict[int, slice]:
        starts = np.flatnonzero(np.concatenate([[True], self.parent[1:] != self.parent[:-1]]))
        ends = [*starts[1:], len(self.parent)]
        return {int(self.parent[start]): slice(int(start), int(end)) for start, end in zip(starts, ends)}

    @functools.cached_property
    def _kept_distances(self) -> dict[int, np.ndarray]:
        return {}

    def _distances(self, parent: int) -> np.ndarray | None:
        children = self._children[parent]
        if children.stop - children.start > _KEPT_DISTANCES:
            return None
        if parent not in self._kept_distances:
            self._kept_distances[parent] = _apart(self.centroids[children], self.centroids[children])
        return self._kept_distances[parent]

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        partial = path.with_name(f".{path.name}.partial")
        with writing(path):
            with open(partial, "wb") as file:
                np.savez(file, centroids=self.centroids, parent=self.parent)
            partial.replace(path)


def load(path: Path) -> Cells:
    """What `save` wrote."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Cells(arrays["centroids"], arrays["parent"])
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise LensError(f"{path}: not cells of vectors ({error}); remove it") from None


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Vectors [n, D] in float32 and of length 1."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]


def usable(vectors: np.ndarray) -> np.ndarray:
    """Whether vectors [n, D] have a direction, bool [n]: all numbers are finite and not all are zero."""
    vectors = np.asarray(vectors, np.float32)
    squares = np.einsum("nd,nd->n", vectors, vectors)
    return np.isfinite(squares) & (squares > 0)


def sample_size(centroids: int) -> int:
    """How many vectors `make_cells` wants to see."""
    return max(SAMPLE, SAMPLE_EACH * centroids)


def make_cells(sample: np.ndarray, count: int, centroids: int, max_cell: int, reach: float) -> Cells:
    """Cells for `count` vectors, of a sample of them, unit vectors float32 [m, D] in random order.

    So many `centroids` are the first of the sample, moved twice to the mean of their vectors. Cells in which more than
    `max_cell` of `count` are then at home are divided, and those with eight times as many at home and visiting: what
    visits most cells would visit most of their parts as well.
    """
    tree, parents = [], []
    waiting = [(-1, centroids, sample, np.ones(len(sample), bool), 0)]
    while waiting:
        parent, wanted, vectors, home, depth = waiting.pop(0)
        points = _lloyd(vectors[home], wanted)
        placed = _place(vectors, home, points, reach, None)
        at_home = placed.home & home[placed.row]
        sizes, homes = (
            np.bincount(cells, minlength=len(points)) * (count / len(sample))
            for cells in (placed.cell, placed.cell[at_home])
        )
        if parent >= 0 and sizes.max() > 0.9 * len(vectors) * count / len(sample):
            continue  # one spot, which no centroids divide
        first = len(parents)
        tree.append(points)
        parents += [parent] * len(points)
        large = (homes > max_cell) | (sizes > _VISITORS * max_cell)
        for cell in np.flatnonzero(large) if depth < _DEPTH else ():
            inside = placed.cell == cell
            rows, here = placed.row[inside], at_home[inside]
            divided = min(int(np.ceil(2 * sizes[cell] / max_cell)), np.count_nonzero(here) // 2)
            if divided > 1:
                waiting.append((first + int(cell), divided, vectors[rows], here, depth + 1))
    return Cells(np.concatenate(tree), np.array(parents))


def _lloyd(vectors: np.ndarray, count: int) -> np.ndarray:
    """`count` centroids of length 1; one that no vector is nearest to stays where it was."""
    points = vectors[:count].copy()
    for _ in range(_LLOYD_STEPS):
        nearest = np.concatenate([np.argmax(block @ points.T, 1) for block in _blocks(vectors, len(points))])
        order = np.argsort(nearest, kind="stable")
        starts = np.flatnonzero(np.concatenate([[True], np.diff(nearest[order]) > 0]))
        sums = np.add.reduceat(vectors[order], starts, axis=0)
        length = np.sqrt(np.einsum("nd,nd->n", sums, sums))
        moved = length > 1e-3  # opposite vectors may cancel
        points[nearest[order][starts][moved]] = sums[moved] / length[moved, None]
    return points


def _place(
    vectors: np.ndarray, home: np.ndarray, points: np.ndarray, reach: float, distances: np.ndarray | None
) -> Placed:
    """The cells of one level, for vectors of which those of `home`, bool [n], are at home in the cell it divides.

    Visitors there are sent on to both sides, since where they come to lie two of them do not meet.
    """
    parts, start = [], 0
    for block in _blocks(vectors, len(points)):
        products = block @ points.T
        nearest = np.argmax(products, 1)
        if distances is None:
            used, place = np.unique(nearest, return_inverse=True)
            apart = _apart(points[used], points)[place]
        else:
            apart = distances[nearest]
        largest = np.take_along_axis(products, nearest[:, None], 1)
        row, cell = np.nonzero(products + reach * apart >= largest - _SLACK)
        sent = (cell <= nearest[row]) | ~home[start + row]
        row, cell = row[sent], cell[sent]
        parts.append(Placed(start + row, cell, cell == nearest[row]))
        start += len(block)
    if not parts:
        return Placed(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, bool))
    return Placed(*(np.concatenate(column) for column in zip(*parts)))


def _apart(some: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distances [len(some), len(points)], none too short: rounding could make that of two close centroids 0."""
    squares = lambda x: np.einsum("nd,nd->n", x, x)
    return np.sqrt(np.maximum(squares(some)[:, None] + squares(points) - 2 * some @ points.T, 0) + 1e-6)


def _blocks(vectors: np.ndarray, width: int):
    rows = max(1, _BLOCK // width)
    return (vectors[start : start + rows] for start in range(0, len(vectors), rows))
