"""What a data set holds: `manifest.json`, written last, and the shards it lists."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lens_jax.data.buckets import Bucket
from lens_jax.data.records import Record
from lens_jax.data.shards import ShardReader
from lens_jax.errors import LensError

NAME = "manifest.json"
FORMAT = "lens-jax data"
FEATURES = "features"
VERSION = 1
SPLITS = ("train", "validation")
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Shard:
    """One file of records of one bucket and split."""

    name: str
    split: str
    height: int
    width: int
    records: int
    bytes: int
    # sha256 over the records as written; independent of the container's layout.
    sha256: str

    @property
    def bucket(self) -> Bucket:
        """The size of every image in it."""
        return Bucket(self.height, self.width)


@dataclass(frozen=True)
class Manifest:
    """A data set."""

    # Where it lies; not part of the file.
    directory: Path
    # "openmoji" or "folder"; "features" where the records are latents and text features (see `features`).
    source: str
    # The configuration it was made with.
    config: Mapping[str, object]
    # Licence of the images.
    licence: str
    # Languages with captions in the train split, and those kept for evaluation.
    languages: tuple[str, ...]
    holdout_languages: tuple[str, ...]
    # The sizes images were cropped to; a bucket may be empty.
    buckets: tuple[Bucket, ...]
    # Records of each split with captions in each language.
    captioned: Mapping[str, Mapping[str, int]]
    # The files with the records.
    shards: tuple[Shard, ...]
    # Number of inputs left out, by reason; and by bucket ("HxW") where the image's size is known.
    dropped: Mapping[str, int] = field(default_factory=dict)
    dropped_by_bucket: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    # The first thousand inputs left out: {"file", "reason", "detail"}.
    failed: tuple[Mapping[str, str], ...] = ()

    @property
    def features(self) -> Mapping[str, Any] | None:
        """What `lens-jax precompute` made the records with; None where they are images and captions."""
        return self.config if self.source == FEATURES else None

    def select(self, split: str, bucket: Bucket) -> tuple[Shard, ...]:
        """The shards of one split and bucket, in order."""
        return tuple(shard for shard in self.shards if shard.split == split and shard.bucket == bucket)

    def counts(self, split: str) -> tuple[int, ...]:
        """Records of a split, bucket by bucket."""
        return tuple(sum(shard.records for shard in self.select(split, bucket)) for bucket in self.buckets)

    def records(self, split: str) -> Iterator[Record]:
        """Every record of a split, bucket by bucket."""
        for bucket in self.buckets:
            for shard in self.select(split, bucket):
                with ShardReader(self.directory / shard.name, shard.records) as reader:
                    for start in range(0, shard.records, 64):
                        yield from reader.read(range(start, min(start + 64, shard.records)))


def fingerprint(manifest: Manifest) -> str:
    """Sixteen hexadecimal digits that change when any record or the order of records does, and not with the path."""
    parts = [[s.split, s.height, s.width, s.records, s.sha256] for s in manifest.shards]
    text = json.dumps([VERSION, [str(b) for b in manifest.buckets], parts], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_manifest(manifest: Manifest) -> None:
    """Write manifest.json into its directory. Call it after the shards are complete."""
    buckets = []
    for index, bucket in enumerate(manifest.buckets):
        kept = {split: manifest.counts(split)[index] for split in SPLITS}
        dropped = dict(manifest.dropped_by_bucket.get(str(bucket), {}))
        buckets.append({"height": bucket.height, "width": bucket.width, "kept": kept, "dropped": dropped})
    content = {
        "format": FORMAT,
        "version": VERSION,
        "source": manifest.source,
        "licence": manifest.licence,
        "languages": list(manifest.languages),
        "holdout_languages": list(manifest.holdout_languages),
        "config": dict(manifest.config),
        "captioned": {split: dict(counts) for split, counts in manifest.captioned.items()},
        "buckets": buckets,
        "dropped": dict(manifest.dropped),
        "failed_total": sum(manifest.dropped.values()),
        "failed": list(manifest.failed),
        "shards": [asdict(shard) for shard in manifest.shards],
    }
    path = manifest.directory / NAME
    partial = path.with_name(NAME + ".partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def load_manifest(path: str | os.PathLike) -> Manifest:
    """The data set at `path`, its shards checked for presence and size. LensError says what is wrong in one line."""
    directory = Path(path)
    file = directory / NAME
    if not file.is_file():
        hint = "make one with `lens-jax prepare openmoji` or `lens-jax prepare folder`"
        raise LensError(f"no data set at {directory} (no {NAME}): {hint}")
    content = _read(file)
    if content.get("version") != VERSION:
        found = content.get("version")
        raise LensError(f"{file}: format version {found!r:.40}; this program reads {VERSION}: prepare it again")
    try:
        manifest = _from_json(directory, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LensError(f"{file}: damaged ({type(error).__name__}: {error}); prepare the data set again") from error
    for shard in manifest.shards:
        _check_shard(directory / shard.name, shard)
    return manifest


def read_source(path: str | os.PathLike) -> str:
    """`source` of the data set at `path`, whatever the state of its shards."""
    return str(_read(Path(path) / NAME).get("source"))


def _read(file: Path) -> dict:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise LensError(f"{file}: over {MAX_BYTES} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise LensError(f"{file}: cannot be read as JSON ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise LensError(f'{file}: not a data set ("format" is not {FORMAT!r})')
    return content


def _from_json(directory: Path, content: dict) -> Manifest:
    buckets = tuple(Bucket(int(entry["height"]), int(entry["width"])) for entry in content["buckets"])
    shards = tuple(Shard(**entry) for entry in content["shards"])
    for shard in shards:
        numbers = (shard.height, shard.width, shard.records, shard.bytes)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"shard {shard.name!r} has a number that is not a count")
        if os.path.basename(shard.name) != shard.name or shard.split not in SPLITS or shard.bucket not in buckets:
            raise ValueError(f"shard {shard.name!r} is outside the data set, or of no known split or bucket")
    return Manifest(
        directory=directory,
        source=str(content["source"]),
        config=dict(content["config"]),
        licence=str(content["licence"]),
        languages=tuple(map(str, content["languages"])),
        holdout_languages=tuple(map(str, content["holdout_languages"])),
        buckets=buckets,
        captioned={split: dict(counts) for split, counts in content["captioned"].items()},
        shards=shards,
        dropped=dict(content["dropped"]),
        dropped_by_bucket={str(b): dict(entry["dropped"]) for b, entry in zip(buckets, content["buckets"])},
        failed=tuple(content["failed"]),
    )


def _check_shard(path: Path, shard: Shard) -> None:
    if not path.is_file():
        raise LensError(f"{path}: this shard is listed in {NAME} but missing; prepare the data set again")
    size = path.stat().st_size
    if size != shard.bytes:
        raise LensError(f"{path}: {size} bytes, {NAME} says {shard.bytes}; truncated? prepare the data set again")
