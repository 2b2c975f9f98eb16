"""Random access to the records of a data set, with a bounded number of open shards."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lens_jax.data.index import Index, Shard, Stream
from lens_jax.data.shards import ShardReader
from lens_jax.errors import LensError

# Of the 1,024 files that a process may usually have open.
OPEN_FILES = 128


class RecordReader:
    """Records of an index by stream and position, for any number of threads; shards are opened when first needed.

    At most `open_files` of them stay open, or as many as there are threads reading if that is more. The one unused for
    longest is closed first, and none while it is in use. Opening one again costs 0.05 ms on a local disk.
    """

    def __init__(self, index: Index, open_files: int = OPEN_FILES):
        if open_files < 1:
            raise LensError(f"open_files {open_files}: at least one shard must be open to read from it")
        self._index, self._most = index, open_files
        self._ends: dict[Stream, np.ndarray] = {}
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._opening = 0
        self._lock = threading.Lock()

    def read(self, stream: Stream, positions: np.ndarray) -> list:
        """The records at `positions` of a stream, in that order.

        Positions count through the stream's shards in order. Feature records where the data set is of those.
        """
        if stream not in self._ends:
            self._ends[stream] = np.cumsum(self._index.shard_records(stream))
        positions, ends = np.asarray(positions), self._ends[stream]
        if len(positions) and not 0 <= positions.min() <= positions.max() < stream.records:
            raise LensError(f"{self._index.directory}: {stream.name} has {stream.records} records, from position 0 on")
        owners = np.searchsorted(ends, positions, side="right")
        found: list = [None] * len(positions)
        for number in np.unique(owners):
            rows = np.flatnonzero(owners == number)
            shard = self._index.shard(stream, int(number))
            with self._using(shard) as reader:
                records = reader.read(positions[rows] - (ends[number] - shard.records))
            for row, record in zip(rows, records):
                found[row] = record
        return found

    def close(self) -> None:
        """Close the shards that are not in use; reading goes on to open others."""
        self._close_unused(0)

    @contextlib.contextmanager
    def _using(self, shard: Shard) -> Iterator[ShardReader]:
        entry = self._held(shard.name) or self._opened(shard)
        try:
            yield entry.reader
        finally:
            with self._lock:
                entry.users -= 1
            self._close_unused(self._most)

    def _held(self, name: str) -> "_Open | None":
        with self._lock:
            entry = self._open.get(name)
            if entry:
                entry.users += 1
                self._open.move_to_end(name)
            return entry

    def _opened(self, shard: Shard) -> "_Open":
        # Not under the lock: on a network file system opening takes as long as reading. Room is made first.
        with self._lock:
            self._opening += 1
        surplus = None
        try:
            self._close_unused(self._most)
            reader = self._index.open(shard)
            with self._lock:
                entry = self._open.setdefault(shard.name, _Open(reader))
                entry.users += 1
                self._open.move_to_end(shard.name)
                # Another thread may have opened the same one meanwhile.
                surplus = None if entry.reader is reader else reader
        finally:
            with self._lock:
                self._opening -= 1
        if surplus:
            surplus.close()
        return entry

    def _close_unused(self, most: int) -> None:
        """Close what is unused, the oldest first, until with those being opened `most` are left."""
        closed = []
        with self._lock:
            excess = len(self._open) + self._opening - most
            if excess > 0:
                unused = [name for name, entry in self._open.items() if not entry.users]
                closed = [self._open.pop(name).reader for name in unused[:excess]]
        for reader in closed:
            reader.close()


@dataclass
class _Open:
    reader: ShardReader
    users: int = 0
