"""Sorting more than memory holds: sorted runs on disk, merged."""

import heapq
import itertools
import struct
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path

from lens_jax.errors import LensError

Pair = tuple[bytes, bytes]

# Runs merged at a time: each is an open file with a buffer.
_FAN = 64
_LENGTHS = struct.Struct("<II")
# What a pair costs besides its bytes: a tuple and two headers.
_OVERHEAD = 130
_numbers = itertools.count()


class DiskSort:
    """Takes (key, value) pairs, and gives them back by key, equal keys in the order in which they came.

    About `room` bytes of them are in memory; what is more waits in files in `folder`: LensError where these cannot be
    written. No key or value exceeds 4 GiB.
    """

    def __init__(self, folder: Path, room: int = 64 << 20):
        self._folder, self._room = folder, room
        self._held: list[Pair] = []
        self._size = 0
        # Runs of level n are _FAN times as long as those of level n - 1, and came before them.
        self._levels: list[list[Path]] = [[]]

    def add(self, key: bytes, value: bytes) -> None:
        """Take one pair."""
        self._held.append((key, value))
        self._size += len(key) + len(value) + _OVERHEAD
        if self._size >= self._room:
            self._put_down()

    def sorted(self) -> Iterator[Pair]:
        """All pairs, once; the files are removed as they are read."""
        if self._levels == [[]]:
            yield from sorted(self._held, key=itemgetter(0))
            return
        self._put_down()
        yield from _merge([run for runs in reversed(self._levels) for run in runs])

    def _put_down(self) -> None:
        self._held.sort(key=itemgetter(0))
        self._levels[0].append(self._write(self._held))
        self._held, self._size = [], 0
        for level in itertools.count():
            if len(self._levels[level]) < _FAN:
                return
            if level + 1 == len(self._levels):
                self._levels.append([])
            self._levels[level + 1].append(self._write(_merge(self._levels[level])))
            self._levels[level] = []

    def _write(self, pairs: Iterable[Pair]) -> Path:
        path = self._folder / f"run-{next(_numbers)}"
        try:
            with open(path, "xb") as file:
                for key, value in pairs:
                    file.write(_LENGTHS.pack(len(key), len(value)) + key + value)
        except OSError as error:  # or whoever reads what is sorted would take it for a fault of theirs
            raise LensError(f"{path}: cannot be written: {error.strerror}") from error
        return path


def _merge(runs: list[Path]) -> Iterator[Pair]:
    yield from heapq.merge(*map(_read, runs), key=itemgetter(0))


def _read(path: Path) -> Iterator[Pair]:
    with open(path, "rb") as file:
        while lengths := file.read(_LENGTHS.size):
            key, value = _LENGTHS.unpack(lengths)
            yield file.read(key), file.read(value)
    path.unlink()
