"""Shard files: ArrayRecord with one record a chunk, so that any record can be read alone.

array_record 0.8.6 raises RuntimeError on most damage, but opens a missing file, a file cut at a multiple of 64 KiB, and
any file when descriptors have run out, as one with no records. So a reader checks that the file exists and how long it
is, takes the number of records it should hold, and asks again where it holds none.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lens_jax.data.records import Record, decode, encode, text_fault
from lens_jax.errors import LensError


class ShardWriter:
    """Writes records to `path`; the file appears under that name only when the block ends without an error.

    with ShardWriter(path) as writer:
        writer.write(record)
    """

    def __init__(self, path: str | os.PathLike, compress: bool = True):
        """Images hardly shrink and features not at all: `compress` is for what is text."""
        from array_record.python.array_record_module import ArrayRecordWriter

        if text_fault(str(path)):
            raise LensError(f"{str(path)!r}: cannot be written: array_record wants paths in UTF-8; choose another")
        self.path = Path(path)
        self.count = 0
        self._partial = self.path.with_name(self.path.name + ".partial")
        with self._writing():
            self._writer = ArrayRecordWriter(str(self._partial), "group_size:1" + ("" if compress else ",uncompressed"))

    def write(self, record: Record) -> None:
        """Append one record."""
        self.write_entry(encode(record))

    def write_entry(self, entry: bytes) -> None:
        """Append one record that is encoded already."""
        with self._writing():
            self._writer.write(entry)
        self.count += 1

    def close(self) -> None:
        """Finish the file and give it its name."""
        with self._writing():
            self._writer.close()
        os.replace(self._partial, self.path)

    def abandon(self) -> None:
        """Drop what was written."""
        with contextlib.suppress(RuntimeError):  # repeats why it could not be written
            self._writer.close()
        self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except RuntimeError as error:
            failed = f"{self.path}: cannot be written ({_reason(error)})"
            raise LensError(_too_many(self.path, error) or failed) from error

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.close() if kind is None else self.abandon()


class ShardReader:
    """Random access to the records of one shard; safe to share between threads.

    `expected` and `size` are the records and bytes that the index promises; None skips that check. `decode` makes a
    record of an entry and its place. Damage raises LensError.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        expected: int | None = None,
        size: int | None = None,
        decode: Callable[[bytes, str], Any] = decode,
    ):
        from array_record.python.array_record_module import ArrayRecordReader

        self.path, self._decode = Path(path), decode
        check_file(self.path, size)
        try:
            # Read-ahead would fetch neighbours that a shuffled epoch does not want.
            self._reader = ArrayRecordReader(str(self.path), "readahead_buffer_size:0")
            self._count = self._reader.num_records()
        except RuntimeError as error:
            raise LensError(_failed(self.path, error)) from error
        if not self._count and (reason := self._ask_why()):
            raise LensError(reason)
        if expected is not None and self._count != expected:
            raise LensError(
                f"{self.path}: holds {self._count} records, the index says {expected}; "
                "the file is truncated or from another data set: prepare it again"
            )

    def _ask_why(self) -> str:
        """What array_record says only when it is read from: that descriptors ran out as it opened the file."""
        try:
            self._reader.read([0])
        except (RuntimeError, IndexError) as error:
            return _too_many(self.path, error)
        return ""

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
            raise LensError(_failed(self.path, error)) from error
        return [self._decode(entry, f"{self.path}[{position}]") for entry, position in zip(entries, positions)]

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(RuntimeError):  # repeats what was wrong with a damaged file; reading has said so
            self._reader.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def check_file(path: Path, size: int | None = None) -> None:
    """LensError unless there is a file, of `size` bytes if that is given."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise LensError(f"{path}: no such shard ({error.strerror}); prepare the data set again") from None
    if size is not None and found != size:
        raise LensError(f"{path}: {found} bytes, the index says {size}; truncated? prepare the data set again")


def _failed(path: Path, error: Exception) -> str:
    damaged = f"{path}: truncated or damaged ArrayRecord file ({_reason(error)}); prepare the data set again"
    return _too_many(path, error) or damaged


def _too_many(path: Path, error: Exception) -> str:
    """What to say if descriptors have run out, else nothing; array_record tells its reasons apart by words alone."""
    if not any(os.strerror(number).lower() in str(error).lower() for number in (errno.EMFILE, errno.ENFILE)):
        return ""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"{path}: too many open files, this process may have {limit}; raise the limit: ulimit -n {4 * limit}"


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0].split(";")[0][:120]
