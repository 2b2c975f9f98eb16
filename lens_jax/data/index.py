"""Stands in for the index of branch `storage` until that is merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lens_jax.data.buckets import Bucket
from lens_jax.data.manifest import fingerprint, load_manifest


@dataclass(frozen=True)
class Stream:
    split: str
    bucket: Bucket
    text_class: int
    records: int
    shards: int


@dataclass(frozen=True)
class Index:
    directory: Path
    source: str
    config: Mapping
    languages: tuple[str, ...]
    holdout_languages: tuple[str, ...]
    buckets: tuple[Bucket, ...]
    captioned: Mapping
    features: Mapping | None
    fingerprint: str
    streams: tuple[Stream, ...]
    manifest: object

    def shard_records(self, stream):
        return np.array([shard.records for shard in self.manifest.select(stream.split, stream.bucket)], np.int64)


def load_index(path) -> Index:
    m = load_manifest(path)
    streams = []
    for split in ("train", "validation"):
        for bucket in m.buckets:
            shards = m.select(split, bucket)
            if shards:
                streams.append(Stream(split, bucket, 0, sum(s.records for s in shards), len(shards)))
    return Index(
        m.directory,
        m.source,
        m.config,
        m.languages,
        m.holdout_languages,
        m.buckets,
        m.captioned,
        m.features,
        fingerprint(m),
        tuple(streams),
        m,
    )


NAME = "manifest.json"
