"""Writing what a data set holds: a row for each shard as it closes, and the header when all is there."""

import hashlib
import json
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lens_jax.atomic import writing
from lens_jax.data.buckets import Bucket
from lens_jax.data.index import FORMAT, MAGIC, NAME, ROW, SPLITS, VERSION, Index, Stream, fingerprint, stream_name
from lens_jax.data.subset import Subset

_BUFFERED_ROWS = 1024


class IndexWriter:
    """Writes an index into `directory`: `add` for every shard once it is complete, then `finish`.

    Each call of `add` costs the same, and none but `finish` leaves anything that looks like a data set.
    """

    def __init__(self, directory: str | os.PathLike):
        self._directory = Path(directory)
        # Several processes that share a data set may all come to write the (same) index.
        self._aside = f".partial-{secrets.token_hex(4)}"
        self._tables: dict[tuple[str, Bucket, int], _TableWriter] = {}

    def add(self, split: str, bucket: Bucket, text_class: int, count: int, size: int, sha256: str) -> None:
        """Append a shard of `count` records in a file of `size` bytes to its stream; an empty one needs no file."""
        key = split, bucket, text_class
        path = self._directory / f"{stream_name(*key)}.shards"
        with writing(path):
            if key not in self._tables:
                self._tables[key] = _TableWriter(path, path.with_name(path.name + self._aside))
            self._tables[key].add(count, size, bytes.fromhex(sha256))

    def finish(self, buckets: Sequence[Bucket], **fields) -> Index:
        """Name the tables, then write index.json. `fields` are those of Index that are not known here."""
        with writing(self._directory / NAME):
            return self._finish(buckets, **fields)

    def _finish(self, buckets: Sequence[Bucket], **fields) -> Index:
        order = lambda key: (SPLITS.index(key[0]), buckets.index(key[1]), key[2] or math.inf)
        streams, digests, contents = [], {}, []
        for key in sorted(self._tables, key=order):
            table = self._tables[key]
            if table.records:
                stream = Stream(*key, table.records, table.shards)
                streams.append(stream)
                digests[stream.name] = table.finish()
                contents.append(table.content.hexdigest())
            else:
                table.abandon()
        name = fingerprint(buckets, streams, contents)
        index = Index(
            directory=self._directory, buckets=tuple(buckets), streams=tuple(streams), fingerprint=name,
            digests=digests, **fields,
        )  # fmt: skip
        text = json.dumps(_to_json(index, contents), ensure_ascii=False, indent=1) + "\n"
        partial = self._directory / (NAME + self._aside)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self._directory / NAME)
        return index

    def abandon(self) -> None:
        """Drop the tables that were begun."""
        for table in self._tables.values():
            table.abandon()


class _TableWriter:
    def __init__(self, path: Path, partial: Path):
        self._path, self._partial = path, partial
        self._partial.write_bytes(MAGIC)
        # Of the table, and of the part of it that does not depend on how the container lays records out.
        self._digest, self.content = hashlib.sha256(MAGIC), hashlib.sha256()
        self._rows = bytearray()
        self.records = self.shards = 0

    def add(self, count: int, size: int, sha256: bytes) -> None:
        row = np.array((count, size, sha256), ROW).tobytes()
        self._rows += row
        self._digest.update(row)
        self.content.update(row[:8] + sha256)
        self.records, self.shards = self.records + count, self.shards + 1
        if len(self._rows) >= _BUFFERED_ROWS * ROW.itemsize:
            self._flush()

    def _flush(self) -> None:
        # Not kept open: a data set may have hundreds of streams.
        with open(self._partial, "ab") as file:
            file.write(self._rows)
        self._rows.clear()

    def finish(self) -> str:
        """Give the file its name; returns its sha256."""
        self._flush()
        os.replace(self._partial, self._path)
        return self._digest.hexdigest()

    def abandon(self) -> None:
        self._partial.unlink(missing_ok=True)


def _to_json(index: Index, contents: Sequence[str]) -> dict:
    streams = [
        {
            "split": stream.split,
            "bucket": str(stream.bucket),
            "text_class": stream.text_class,
            "records": stream.records,
            "shards": stream.shards,
            "sha256": index.digests[stream.name],
            "content": content,
        }
        for stream, content in zip(index.streams, contents)
    ]
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": index.fingerprint,
        "source": index.source,
        "licence": index.licence,
        "languages": list(index.languages),
        "holdout_languages": list(index.holdout_languages),
        "config": dict(index.config),
        "captioned": {split: dict(counts) for split, counts in index.captioned.items()},
        "buckets": [str(bucket) for bucket in index.buckets],
        "caption_classes": list(index.caption_classes),
        "caption_count": index.caption_count,
        "streams": streams,
        "dropped": dict(index.dropped),
        "dropped_by_bucket": {bucket: dict(counts) for bucket, counts in index.dropped_by_bucket.items()},
        "failed": list(index.failed),
        **({"subset": _subset_to_json(index.subset)} if index.subset else {}),
    }


def _subset_to_json(subset: Subset) -> dict:
    return {"path": subset.path, "fingerprint": subset.whole.fingerprint, "rows": dict(subset.digests)}
