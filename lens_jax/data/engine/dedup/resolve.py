"""Which of the duplicates are kept: the first in the order of priority, and so on.

An image is dropped if and only if one that is kept comes before it and is its duplicate. So the ends of a chain of
duplicates may both be kept: they are none of each other. Merging all that is connected would keep one of a chain.
"""

from typing import NamedTuple

import numpy as np

from lens_jax.data.engine.dedup.exact import Firsts
from lens_jax.data.engine.dedup.near import Pairs

# Rounds over all pairs, after which what is left is gone through pair by pair: a chain in the order of priority is
# decided at its first end only, and takes a round for every two of it.
_ROUNDS = 64


class Resolved(NamedTuple):
    """What becomes of the rows that have a duplicate; the others are kept."""

    # In the order of priority [n] (see priority.py).
    keys: np.ndarray
    # The place in `keys` of the first kept duplicate that comes before the row; -1 where the row is kept itself.
    duplicate_of: np.ndarray
    # The cosine with it, float32 [n]; 1 where kept.
    cosine: np.ndarray
    # How many images are connected to it by duplicates of either kind, itself included, int64 [n].
    component: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """bool [n]."""
        return self.duplicate_of < 0


def resolve(pairs: Pairs, firsts: Firsts | None = None) -> Resolved:
    """Decide on all rows of some pairs, in any order, in which a pair may be there several times.

    `firsts` tells which rows stand for several files of the same bytes; it matters to `component` alone.
    """
    keys, places = np.unique(np.concatenate([pairs.first, pairs.second]), return_inverse=True)
    first, second = places[: len(pairs.first)], places[len(pairs.first) :]
    kept = _kept(len(keys), first, second)
    # Among the kept duplicates of a row the first, and its cosine.
    named = np.flatnonzero(kept[first])
    named = named[np.lexsort((first[named], second[named]))]
    row = second[named]
    named = named[np.concatenate([[True], row[1:] != row[:-1]])] if len(named) else named
    duplicate_of = np.full(len(keys), -1, np.int64)
    cosine = np.ones(len(keys), np.float32)
    duplicate_of[second[named]] = first[named]
    cosine[second[named]] = pairs.cosine[named]
    copies = np.ones(len(keys), np.int64)
    if firsts is not None and len(keys) and len(firsts.key):
        place = np.minimum(np.searchsorted(keys, firsts.key), len(keys) - 1)
        there = keys[place] == firsts.key
        copies[place[there]] = firsts.count[there]
    return Resolved(keys, duplicate_of, cosine, _components(copies, first, second))


def starved(resolved: Resolved, cut: np.ndarray) -> np.ndarray:
    """Those of the rows `cut`, keys whose list of duplicates was cut off, for which the list decides nothing: all that
    are in it were dropped, so that one that is not in it may be kept. They have to be compared again."""
    return np.intersect1d(resolved.keys[resolved.kept], cut)


def _kept(count: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """bool [count]; rows are numbered by priority, and first < second."""
    undecided, kept = np.ones(count, bool), np.zeros(count, bool)
    for _ in range(_ROUNDS):
        if not len(first):
            break
        waits = np.zeros(count, bool)
        waits[second] = True
        new = undecided & ~waits
        kept |= new
        undecided &= ~new
        undecided[second[kept[first]]] = False
        left = undecided[first] & undecided[second]
        first, second = first[left], second[left]
    if len(first):
        order = np.lexsort((first, second))
        dropped = bytearray(count)
        for before, row in zip(first[order].tolist(), second[order].tolist()):
            if not dropped[before]:  # which is decided by now: all its pairs came before
                dropped[row] = 1
        undecided &= np.frombuffer(dropped, np.uint8) == 0
    return kept | undecided


def _components(copies: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(copies)
    if not count:
        return np.empty(0, np.int64)
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
    _, label = connected_components(graph, directed=False)
    sizes = np.zeros(count, np.int64)
    np.add.at(sizes, label, copies)
    return sizes[label]
