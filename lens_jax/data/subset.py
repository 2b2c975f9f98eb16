"""A data set that is some of the records of another one, without a copy of them.

    index.json               as of any data set; its "subset" says where the other one lies, and which it is
    train-512x512.shards     a row for each shard of the other's stream: how many of its records are chosen
    train-512x512.rows       which they are: positions within their shards, rising, shard by shard

All that reads a data set reads a subset: a shard of it is a shard of the other one with some of its records.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lens_jax.errors import LensError

# A file of rows: these eight bytes, then the positions.
MAGIC = b"lensrows"
ROW = np.dtype("<u4")


class Chosen(NamedTuple):
    """What a shard of a subset is made of."""

    # The shard (`index.Shard`) of the other data set.
    whole: Any
    # uint32, rising: positions in it.
    rows: np.ndarray


@dataclass(frozen=True)
class Subset:
    """Of which data set an index is a subset, and of which of its records. Safe to share between threads."""

    # Where the other one lies, from the folder of the subset.
    path: str
    # Its index (`index.Index`), which is no subset itself.
    whole: Any
    # The sha256 of each file of rows, by the stream's name; the files that were read.
    digests: Mapping[str, str]
    _rows: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def chosen(self, directory: Path, stream: str, number: int, counts: np.ndarray) -> Chosen:
        """What is chosen of the shard of that number, where `counts` [shards] of each are. LensError for damage."""
        path = directory / f"{stream}.rows"
        if stream not in self._rows:
            self._rows[stream] = _read(path, int(counts.sum()), self.digests[stream])
        start = int(counts[:number].sum())
        rows = self._rows[stream][start : start + int(counts[number])]
        whole = self.whole.shard(next(s for s in self.whole.streams if s.name == stream), number)
        if len(rows) and (np.any(rows[1:] <= rows[:-1]) or rows[-1] >= whole.records):
            raise LensError(f"{path}: chooses records that {whole.name} does not have; make the subset again")
        return Chosen(whole, rows)


class ChosenReader:
    """A `shards.ShardReader` of the records that are chosen."""

    def __init__(self, reader: Any, rows: np.ndarray):
        self._reader, self._rows = reader, rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, positions: Sequence[int]) -> list:
        """The records at `positions` among those that are chosen, in that order."""
        for position in positions:
            if not 0 <= position < len(self._rows):
                raise LensError(f"{self._reader.path}: no record {position}; {len(self._rows)} are chosen of it")
        return self._reader.read([int(self._rows[position]) for position in positions])

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def write(path: Path, parts: Sequence[np.ndarray]) -> str:
    """A file of rows, of the shards of a stream in order; its sha256."""
    data = MAGIC + b"".join(np.asarray(part, ROW).tobytes() for part in parts)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def digest(whole: str, rows: np.ndarray) -> str:
    """The sha256 that stands for some records of a shard whose own is `whole`."""
    return hashlib.sha256(bytes.fromhex(whole) + np.asarray(rows, ROW).tobytes()).hexdigest()


def _read(path: Path, count: int, sha256: str) -> np.ndarray:
    try:
        size, expected = path.stat().st_size, len(MAGIC) + count * ROW.itemsize
        if size != expected:
            raise LensError(f"{path}: {size} bytes, the index says {expected}; truncated? make the subset again")
        data = path.read_bytes()
    except OSError as error:
        raise LensError(f"{path}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise LensError(f"{path}: not as the index says (its sha256 is another); make the subset again")
    return np.frombuffer(data, ROW, offset=len(MAGIC))
