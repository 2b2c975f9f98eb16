"""The shards of a data set while it is written: one series of files for each split and bucket."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from lens_jax.data.buckets import Bucket
from lens_jax.data.manifest import Shard
from lens_jax.data.shards import ShardWriter

# A file is closed when its records reach this size: large enough to stream, small enough to copy and retry.
SHARD_BYTES = 256 << 20


class ShardSet:
    """The shard files of a data set being written; abandoned when the block fails before `finish`."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._open: dict[tuple[str, Bucket], tuple[ShardWriter, list]] = {}  # the list is [digest, bytes]
        self._done: dict[tuple[str, Bucket], list[Shard]] = defaultdict(list)
        self._count: Counter[str] = Counter()
        self._captioned: dict[str, Counter[str]] = defaultdict(Counter)

    def write(self, split: str, bucket: Bucket, entry: bytes, languages: Iterable[str]) -> None:
        """Append one encoded record that has captions in `languages`."""
        key = (split, bucket)
        if key not in self._open:
            name = f"{split}-{bucket}-{len(self._done[key]):05d}"
            self._open[key] = (ShardWriter(self._directory / name), [hashlib.sha256(), 0])
        writer, tally = self._open[key]
        writer.write_entry(entry)
        tally[0].update(len(entry).to_bytes(8, "big") + entry)
        tally[1] += len(entry)
        self._count[split] += 1
        self._captioned[split].update(languages)
        if tally[1] >= SHARD_BYTES:
            self._close(key)

    def count(self, split: str) -> int:
        """Records written to a split so far."""
        return self._count[split]

    def captioned(self) -> dict[str, dict[str, int]]:
        """How many records of each split have captions in each language."""
        return {split: dict(counts) for split, counts in self._captioned.items()}

    def _close(self, key: tuple[str, Bucket]) -> None:
        writer, (digest, _) = self._open.pop(key)
        writer.close()
        split, bucket = key
        size = writer.path.stat().st_size
        shard = Shard(writer.path.name, split, bucket.height, bucket.width, writer.count, size, digest.hexdigest())
        self._done[key].append(shard)

    def finish(self) -> tuple[Shard, ...]:
        """Close all files and give them their final names, which say how many there are."""
        for key in list(self._open):
            self._close(key)
        shards = []
        for key in sorted(self._done):
            for shard in self._done[key]:
                name = f"{shard.name}-of-{len(self._done[key]):05d}.array_record"
                os.rename(self._directory / shard.name, self._directory / name)
                shards.append(replace(shard, name=name))
        return tuple(shards)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for writer, _ in self._open.values():
            writer.abandon()
        self._open.clear()
