"""Shard files: ArrayRecord with one record a chunk, so that any record can be read alone.

array_record 0.8.6 raises RuntimeError on most damage, but opens a missing file and a file cut at a multiple of 64 KiB
as one with no records. So a reader checks that the file exists, and takes the number of records it should hold.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lens_jax.data.records import Record, decode, encode
from lens_jax.errors import LensError


class ShardWriter:
    """Writes records to `path`; the file appears under that name only when the block ends without an error.

    with ShardWriter(path) as writer:
        writer.write(record)
    """

    def __init__(self, path: str | os.PathLike, compress: bool = True):
        """Images hardly shrink and features not at all: `compress` is for what is text."""
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path = Path(path)
        self.count = 0
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._writer = ArrayRecordWriter(str(self._partial), "group_size:1" + ("" if compress else ",uncompressed"))

    def write(self, record: Record) -> None:
        """Append one record."""
        self.write_entry(encode(record))

    def write_entry(self, entry: bytes) -> None:
        """Append one record that is encoded already."""
        self._writer.write(entry)
        self.count += 1

    def close(self) -> None:
        """Finish the file and give it its name."""
        self._writer.close()
        os.replace(self._partial, self.path)

    def abandon(self) -> None:
        """Drop what was written."""
        self._writer.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.close() if kind is None else self.abandon()


class ShardReader:
    """Random access to the records of one shard; safe to share between threads.

    `expected` is the number of records the manifest promises; None skips that check. `decode` makes a record of an
    entry and its place. Damage raises LensError.
    """

    def __init__(
        self, path: str | os.PathLike, expected: int | None = None, decode: Callable[[bytes, str], Any] = decode
    ):
        from array_record.python.array_record_module import ArrayRecordReader

        self.path, self._decode = Path(path), decode
        if not self.path.is_file():
            raise LensError(f"{self.path}: no such shard")
        try:
            # Read-ahead would fetch neighbours that a shuffled epoch does not want.
            self._reader = ArrayRecordReader(str(self.path), "readahead_buffer_size:0")
            self._count = self._reader.num_records()
        except RuntimeError as error:
            raise LensError(_damaged(self.path, error)) from error
        if expected is not None and self._count != expected:
            raise LensError(
                f"{self.path}: holds {self._count} records, the manifest says {expected}; "
                "the file is truncated or from another data set: prepare it again"
            )

    def __len__(self) -> int:
        return self._count

    def read(self, positions: Sequence[int]) -> list:
        """The records at `positions`, in that order."""
        for position in positions:
            if not 0 <= position < self._count:
                raise LensError(f"{self.path}: no record {position}; it holds {self._count}")
        if not len(positions):
            return []  # array_record takes no empty list
        try:
            entries = self._reader.read([int(position) for position in positions])
        except RuntimeError as error:
            raise LensError(_damaged(self.path, error)) from error
        return [self._decode(entry, f"{self.path}[{position}]") for entry, position in zip(entries, positions)]

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(RuntimeError):  # repeats what was wrong with a damaged file; reading has said so
            self._reader.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _damaged(path: Path, error: Exception) -> str:
    reason = str(error).splitlines()[0].split(";")[0][:120]
    return f"{path}: truncated or damaged ArrayRecord file ({reason}); prepare the data set again"
