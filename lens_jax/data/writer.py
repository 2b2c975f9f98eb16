"""A data set while it is written: records go to their streams, full shards close, the index comes last."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from lens_jax.data.buckets import Bucket
from lens_jax.data.index import Index, shard_name, stream_name
from lens_jax.data.index_writer import IndexWriter
from lens_jax.data.records import MAX_LANGUAGES
from lens_jax.data.shards import ShardWriter
from lens_jax.errors import LensError

# Large enough to stream from an object store, small enough to copy and to try again.
SHARD_BYTES = 256 << 20


class DataWriter:
    """Writes records into `directory`; nothing of a stream but its full shards is left when the block fails.

    A shard of every stream is open at a time: one descriptor and about 2 MB each.
    """

    def __init__(self, directory: str | os.PathLike, buckets: Sequence[Bucket], shard_bytes: int = SHARD_BYTES):
        self._directory, self._buckets, self._shard_bytes = directory, tuple(buckets), shard_bytes
        self._index = IndexWriter(directory)
        self._open: dict[tuple[str, Bucket, int], HashedShard] = {}
        self._done: Counter[tuple[str, Bucket, int]] = Counter()
        self._count: Counter[str] = Counter()
        self._captioned: dict[str, Counter[str]] = defaultdict(Counter)

    def write(self, split: str, bucket: Bucket, text_class: int, entry: bytes, languages: Iterable[str]) -> None:
        """Append one encoded record that has captions in `languages`, of which a split has as many as a record may."""
        key = split, bucket, text_class
        if key not in self._open:
            path = os.path.join(self._directory, shard_name(stream_name(*key), self._done[key]))
            self._open[key] = HashedShard(path)
        shard = self._open[key]
        shard.write(entry)
        self._count[split] += 1
        self._captioned[split].update(languages)
        if len(self._captioned[split]) > MAX_LANGUAGES:
            names = ", ".join(list(self._captioned[split])[:3])
            raise LensError(
                f"captions in over {MAX_LANGUAGES} languages: {names}, ...; is something else called `language` in a "
                "table, or a map of captions not by language?"
            )
        if shard.written >= self._shard_bytes:
            self._close(key)

    def count(self, split: str) -> int:
        """Records written to a split so far."""
        return self._count[split]

    def captioned(self) -> dict[str, dict[str, int]]:
        """How many records of each split have captions in each language."""
        return {split: dict(counts) for split, counts in self._captioned.items()}

    def finish(self, **fields) -> Index:
        """Close all shards and write the index; `fields` are those of Index that are not known here."""
        for key in list(self._open):
            self._close(key)
        return self._index.finish(self._buckets, captioned=self.captioned(), **fields)

    def _close(self, key: tuple[str, Bucket, int]) -> None:
        self._index.add(*key, *self._open.pop(key).close())
        self._done[key] += 1

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for shard in self._open.values():
            shard.abandon()
        self._open.clear()
        if kind is not None:
            self._index.abandon()


class HashedShard:
    """A shard while it is written, and the hash over its records; its folder is made if need be."""

    def __init__(self, path: str | os.PathLike, compress: bool = True):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._shard, self._digest = ShardWriter(path, compress), hashlib.sha256()
        # Bytes of its records.
        self.written = 0

    def write(self, entry: bytes) -> None:
        """Append one encoded record."""
        self._shard.write_entry(entry)
        self._digest.update(len(entry).to_bytes(8, "big") + entry)
        self.written += len(entry)

    def close(self) -> tuple[int, int, str]:
        """(records, bytes of the file, sha256) of the shard, which is there now."""
        self._shard.close()
        return self._shard.count, self._shard.path.stat().st_size, self._digest.hexdigest()

    def abandon(self) -> None:
        """Drop what was written."""
        self._shard.abandon()
