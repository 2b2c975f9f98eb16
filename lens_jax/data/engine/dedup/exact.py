"""Exact duplicates: files of the same bytes, of which the first in the order of priority is kept."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

SHA_BYTES = 32


class Firsts(NamedTuple):
    """For each file of several rows the row that comes first; sorted by the hash of the file."""

    # Of the file, S32 [n], and the key of the row (see priority.py).
    sha256: np.ndarray
    key: np.ndarray
    # How many rows have the file, int64 [n].
    count: np.ndarray


def firsts(sha256: np.ndarray, keys: np.ndarray, count: np.ndarray | None = None) -> Firsts:
    """The first row of each file. `count` is for rows that stand for several, so that parts can be put together."""
    count = np.ones(len(keys), np.int64) if count is None else count
    if not len(keys):
        return Firsts(sha256, keys, count)
    order = np.lexsort((keys, sha256))
    sha256, keys, count = sha256[order], keys[order], count[order]
    starts = np.flatnonzero(np.concatenate([[True], sha256[1:] != sha256[:-1]]))
    return Firsts(sha256[starts], keys[starts], np.add.reduceat(count, starts))


def together(parts: Iterable[Firsts]) -> Firsts:
    """The first rows of all parts."""
    sha256, keys, count = (np.concatenate(column) for column in zip(*parts))
    return firsts(sha256, keys, count)


def repeated(found: Firsts) -> Firsts:
    """Those of files that are there more than once."""
    return Firsts(*(column[found.count > 1] for column in found))


def first_of_each(sha256: np.ndarray, keys: np.ndarray, found: Firsts) -> np.ndarray:
    """For each row the key of the row that is kept in its place: its own where it is the first of its file."""
    kept = keys.copy()
    if len(found.sha256):
        place = np.minimum(np.searchsorted(found.sha256, sha256), len(found.sha256) - 1)
        there = found.sha256[place] == sha256
        kept[there] = found.key[place[there]]
    return kept
