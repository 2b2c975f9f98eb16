"""What a data set holds. Loading it costs the same whether it has ten shards or a million.

    index.json                              the header: what the data set is, and its streams; written last
    train-512x512-text128.shards            a stream's table: records, bytes and sha256 of each of its shards
    train-512x512-text128/000000.array_record

A stream is the records that batches may be made of together: of one split, one size and one class of caption lengths.
A table is read when it is asked for, and a shard looked at when it is opened. A shard's name follows from its stream
and its number, so names are not stored; how many there are is no part of them, since only the end of writing knows.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lens_jax.data import feature_records, records
from lens_jax.data.buckets import Bucket
from lens_jax.data.shards import ShardReader, check_file
from lens_jax.data.subset import Chosen, ChosenReader, Subset
from lens_jax.errors import LensError

NAME = "index.json"
FORMAT = "lens-jax data"
VERSION = 2
FEATURES = "features"
SPLITS = ("train", "validation")
# A thousand named failures take up to 0.5 MB, and nothing else in a header grows.
MAX_HEADER = 16 << 20

# A table: these eight bytes, then a row for each shard. Opened in an editor it says what it is.
MAGIC = b"lensshrd"
ROW = np.dtype([("records", "<i8"), ("bytes", "<i8"), ("sha256", "V32")])
MAX_SHARDS = 1 << 24  # of one stream: 805 MB of table
_MAX_COUNT = 1 << 40


@dataclass(frozen=True)
class Stream:
    """Records of one split that batches may be made of together."""

    split: str
    bucket: Bucket
    # No caption of its records has more tokens than this, those that stand behind every prompt included; 0 where
    # nothing is known, so that they may have any length.
    text_class: int
    records: int
    shards: int

    @property
    def name(self) -> str:
        """Its folder of shards, and its table without the ending."""
        return stream_name(self.split, self.bucket, self.text_class)


@dataclass(frozen=True)
class Shard:
    """One file of a stream's records."""

    # Path inside the data set.
    name: str
    records: int
    bytes: int
    # Over the records as written; independent of the container's layout.
    sha256: str
    # Of a subset: what of another data set's shard it is.
    chosen: Chosen | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Index:
    """A data set: its header, and its tables of shards once they are asked for. Safe to share between threads."""

    # Where it lies; not part of the file.
    directory: Path
    # "openmoji" or "folder"; "features" where the records are latents and text features (see `features`).
    source: str
    # The configuration it was made with.
    config: Mapping[str, Any]
    # Licence of the images.
    licence: str
    # Languages that captions are drawn from, each in either split, and those kept for evaluation.
    languages: tuple[str, ...]
    holdout_languages: tuple[str, ...]
    # The sizes images were cropped to; a bucket may be empty.
    buckets: tuple[Bucket, ...]
    # Records of each split with captions in each language.
    captioned: Mapping[str, Mapping[str, int]]
    # By split, bucket and class; none is empty.
    streams: tuple[Stream, ...]
    # Sixteen hexadecimal digits that change when any record or the order of records does, and not with the path.
    fingerprint: str
    # The classes of caption lengths it was sorted into, () for none, and what counted: "estimate", "tokenizer", or
    # "encoder" where the features themselves are there.
    caption_classes: tuple[int, ...] = ()
    caption_count: str = ""
    # Number of inputs left out, by reason; and by bucket ("HxW") where the image's size is known.
    dropped: Mapping[str, int] = field(default_factory=dict)
    dropped_by_bucket: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    # The first thousand inputs left out: {"file", "reason", "detail"}.
    failed: tuple[Mapping[str, str], ...] = ()
    # What it is a subset of; None where its records are its own.
    subset: Subset | None = None
    # sha256 of each stream's table, by the stream's name; the tables that were read.
    digests: Mapping[str, str] = field(default_factory=dict, repr=False)
    _tables: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def features(self) -> Mapping[str, Any] | None:
        """What `lens-jax precompute` made the records with; None where they are images and captions."""
        return self.config if self.source == FEATURES else None

    def select(self, split: str) -> tuple[Stream, ...]:
        """The streams of a split, in order."""
        return tuple(stream for stream in self.streams if stream.split == split)

    def counts(self, split: str) -> tuple[int, ...]:
        """Records of a split, bucket by bucket."""
        streams = self.select(split)
        return tuple(sum(stream.records for stream in streams if stream.bucket == b) for b in self.buckets)

    def shard_records(self, stream: Stream) -> np.ndarray:
        """int64 [shards]: the records of each of a stream's shards, in order. Some may have none, and no file."""
        return self._table(stream)["records"]

    def shard(self, stream: Stream, number: int) -> Shard:
        """A stream's shard of that number; it need not exist."""
        row = self._table(stream)[number]
        digest = row["sha256"].tobytes().hex()
        chosen = self.subset and self.subset.chosen(self.directory, stream.name, number, self.shard_records(stream))
        return Shard(shard_name(stream.name, number), int(row["records"]), int(row["bytes"]), digest, chosen)

    def shards_by_number(self, stream: Stream) -> Iterator[Shard]:
        """All shards of a stream, in order, those without records too."""
        return (self.shard(stream, number) for number in range(stream.shards))

    def shards(self, stream: Stream) -> Iterator[Shard]:
        """A stream's shards that have records, in order."""
        for number in np.flatnonzero(self.shard_records(stream)):
            yield self.shard(stream, int(number))

    def open(self, shard: Shard) -> ShardReader | ChosenReader:
        """A reader of a shard; LensError where the file is missing or not as the table says."""
        if shard.chosen:
            return ChosenReader(self.subset.whole.open(shard.chosen.whole), shard.chosen.rows)
        decode = feature_records.decode if self.features else records.decode
        return ShardReader(self.directory / shard.name, shard.records, shard.bytes, decode)

    def check(self) -> int:
        """The number of shards, if all are there and of the right size; LensError names the first that is not."""
        number, home = 0, self.subset.whole.directory if self.subset else self.directory
        for shard in itertools.chain.from_iterable(map(self.shards, self.streams)):
            check_file(home / shard.name, shard.bytes)
            number += 1
        return number

    def records(self, split: str) -> Iterator[records.Record | feature_records.FeatureRecord]:
        """Every record of a split, stream by stream."""
        for shard in itertools.chain.from_iterable(self.shards(stream) for stream in self.select(split)):
            with self.open(shard) as reader:
                for start in range(0, shard.records, 64):
                    yield from reader.read(range(start, min(start + 64, shard.records)))

    def _table(self, stream: Stream) -> np.ndarray:
        if stream.name not in self._tables:
            path = self.directory / f"{stream.name}.shards"
            self._tables[stream.name] = _read_table(path, stream, self.digests[stream.name])
        return self._tables[stream.name]


def stream_name(split: str, bucket: Bucket, text_class: int) -> str:
    """The name that a stream's files carry."""
    return f"{split}-{bucket}" + (f"-text{text_class}" if text_class else "")


def shard_name(stream: str, number: int) -> str:
    """The path inside a data set of a stream's shard."""
    return f"{stream}/{number:06d}.array_record"


def fingerprint(buckets: Sequence[Bucket], streams: Sequence[Stream], contents: Sequence[str]) -> str:
    """Of a data set whose streams' shards hold what `contents` are the hashes of."""
    parts = [[stream.name, stream.records, stream.shards, content] for stream, content in zip(streams, contents)]
    text = json.dumps([VERSION, [str(b) for b in buckets], parts], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_index(path: str | os.PathLike) -> Index:
    """The data set at `path`, by its header alone. LensError says in one line what is wrong with that."""
    directory = Path(path)
    file = directory / NAME
    if not file.is_file():
        hint = (
            f"make one with `lens-jax prepare openmoji --out {path}` and what else the config's own text says, or with "
            "`lens-jax prepare folder`"
        )
        if directory.is_file():
            hint = "it is a file; name one data set, such as one that a mixture names"
        raise LensError(f"no data set at {directory} (no {NAME}): {hint}")
    content = _read_header(file)
    if content.get("version") != VERSION:
        found = content.get("version")
        raise LensError(f"{file}: format version {found!r:.40}; this program reads {VERSION}: prepare it again")
    return _from_json(directory, content, str(file))


def read_source(path: str | os.PathLike) -> str:
    """`source` of the data set at `path`, whatever the state of the rest."""
    return str(_read_header(Path(path) / NAME).get("source"))


def is_subset(path: str | os.PathLike) -> bool:
    """Whether the data set at `path` is a subset of another one, whatever the state of either."""
    return "subset" in _read_header(Path(path) / NAME)


def _read_header(file: Path) -> dict:
    try:
        if file.stat().st_size > MAX_HEADER:
            raise LensError(f"{file}: over {MAX_HEADER} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise LensError(f"{file}: cannot be read as JSON ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise LensError(f'{file}: not a data set ("format" is not {FORMAT!r})')
    return content


def _read_table(path: Path, stream: Stream, sha256: str) -> np.ndarray:
    """[shards] of ROW; LensError unless it is the file that the header means."""
    try:
        size, expected = path.stat().st_size, len(MAGIC) + stream.shards * ROW.itemsize
        if size != expected:
            raise LensError(f"{path}: {size} bytes, {NAME} says {expected}; truncated? prepare the data set again")
        data = path.read_bytes()
    except OSError as error:
        raise LensError(f"{path}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise LensError(f"{path}: not as {NAME} says (its sha256 is another); prepare the data set again")
    table = np.frombuffer(data, ROW, offset=len(MAGIC))
    counts = table["records"]
    if counts.min() < 0 or counts.max() > _MAX_COUNT or table["bytes"].min() < 0 or counts.sum() != stream.records:
        raise LensError(f"{path}: its records do not add up to {stream.records}; prepare the data set again")
    return table


def _from_json(directory: Path, content: dict, where: str) -> Index:
    """The index in a header whose format and version are right; LensError names the first field that is wrong."""
    header = _Header(content, where)
    buckets = tuple(header.bucket("buckets", text) for text in header.texts("buckets"))
    header.need(len(set(buckets)) == len(buckets) > 0, "buckets", "must name some sizes, none twice")
    streams, digests, contents = [], {}, []
    for entry in header.get("streams", list):
        part = _Header(entry, where, "streams: ")
        split, bucket = part.get("split", str), part.bucket("bucket", part.get("bucket", str))
        part.need(split in SPLITS and bucket in buckets, "split", "and bucket must be known ones")
        counts = [part.count(name) for name in ("text_class", "records", "shards")]
        part.need(0 < counts[2] <= MAX_SHARDS, "shards", f"must be from 1 to {MAX_SHARDS}")
        streams.append(Stream(split, bucket, *counts))
        digests[streams[-1].name] = part.digest("sha256")
        contents.append(part.digest("content"))
    header.need(len(digests) == len(streams), "streams", "has one twice")
    stored = header.get("fingerprint", str)
    header.need(stored == fingerprint(buckets, streams, contents), "fingerprint", "is not that of its streams")
    classes = header.get("caption_classes", list)
    header.need(all(type(n) is int and n > 0 for n in classes), "caption_classes", "must list numbers of tokens")
    failed = header.get("failed", list)
    header.need(all(_maps(entry, str) for entry in failed), "failed", "must list maps of texts")
    captioned, by_bucket = header.counts_by("captioned"), header.counts_by("dropped_by_bucket")
    header.need(set(captioned) <= set(SPLITS), "captioned", f"must be by {' and '.join(SPLITS)}")
    subset = _subset(directory, content["subset"], where, streams) if "subset" in content else None
    source, config = header.get("source", str), header.get("config", dict)
    if source == FEATURES:
        _check_features(_Header(config, where, "config."))
    if source == "openmoji":
        _Header(config, where, "config.").count("concepts")
    return Index(
        directory=directory,
        source=source,
        config=config,
        licence=header.get("licence", str),
        languages=header.texts("languages"),
        holdout_languages=header.texts("holdout_languages"),
        buckets=buckets,
        captioned=captioned,
        streams=tuple(streams),
        fingerprint=stored,
        caption_classes=tuple(classes),
        caption_count=header.get("caption_count", str),
        dropped=header.counts("dropped"),
        dropped_by_bucket=by_bucket,
        failed=tuple(failed),
        subset=subset,
        digests=digests,
    )


def _subset(directory: Path, values: Any, where: str, streams: Sequence[Stream]) -> Subset:
    """What a header says it is a subset of, which must be there; LensError where it is not that any more."""
    header = _Header(values, where, "subset.")
    path, rows = header.get("path", str), _Header(header.get("rows", dict), where, "subset.rows.")
    place = directory / path
    if (place / NAME).is_file() and is_subset(place):
        raise LensError(f"{where}: subset of {place}, which is a subset itself; make it of the whole data set")
    try:
        whole = load_index(place)
    except LensError as error:
        raise LensError(f"{where}: a subset, and what it is of cannot be read: {error}") from None
    if whole.fingerprint != header.get("fingerprint", str):
        raise LensError(f"{where}: subset of another state of {place} (fingerprint {whole.fingerprint}); make it again")
    shards = {stream.name: stream.shards for stream in whole.streams}
    for stream in streams:
        header.need(shards.get(stream.name) == stream.shards, "streams", f"has {stream.name}, {place} another or none")
    return Subset(path, whole, {stream.name: rows.digest(stream.name) for stream in streams})


def _check_features(made: "_Header") -> None:
    """LensError unless it says all that training on stored features asks for."""
    for name in ("of", "dtype"):
        made.get(name, str)
    accepted = ", ".join(feature_records.DTYPES)
    made.need(made.get("dtype", str) in feature_records.DTYPES, "dtype", f"must be one of {accepted}")
    for name in ("codec", "text"):
        made.need(isinstance(made.get(name, dict).get("kind"), str), name, "must name its kind")
    made.need(_maps(made.get("weights", dict), str), "weights", "must map networks to digests")
    for name in ("layers", "text_width", "max_tokens"):
        made.need(0 < made.count(name) <= feature_records.MAX_SIZES, name, "must be a positive number")
    for name, values in made.get("fitted", dict).items():
        array = None
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            array = np.array(values, np.float32)
        made.need(array is not None and bool(np.isfinite(array).all()), f"fitted.{name:.40}", "must be numbers")


class _Header:
    """A JSON map whose fields are taken out of it with a check."""

    def __init__(self, values: Any, where: str, prefix: str = ""):
        self._values, self._where, self._prefix = values, where, prefix
        if not isinstance(values, dict):
            raise LensError(f"{where}: {prefix or 'it '}must be a map; prepare the data set again")

    def need(self, condition: bool, name: str, what: str) -> None:
        if not condition:
            raise LensError(f"{self._where}: {self._prefix}{name} {what}; damaged? prepare the data set again")

    def get(self, name: str, kind: type) -> Any:
        names = {str: "a text", list: "a list", dict: "a map", int: "a number"}
        value = self._values.get(name)
        self.need(type(value) is kind, name, f"must be {names[kind]}, found {_shown(value)}")
        return value

    def count(self, name: str) -> int:
        value = self.get(name, int)
        self.need(0 <= value <= _MAX_COUNT, name, f"must not be negative, nor over {_MAX_COUNT}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.get(name, list)
        self.need(all(isinstance(item, str) for item in value), name, "must list texts")
        return tuple(value)

    def digest(self, name: str) -> str:
        value = self.get(name, str)
        self.need(bool(re.fullmatch("[0-9a-f]{64}", value)), name, "must be 64 hexadecimal digits")
        return value

    def bucket(self, name: str, text: str) -> Bucket:
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
        self.need(match is not None, name, f"must be sizes HxW, found {_shown(text)}")
        return Bucket(int(match[1]), int(match[2]))

    def counts(self, name: str) -> dict[str, int]:
        value = self.get(name, dict)
        self.need(_maps(value, int), name, "must map names to numbers")
        return value

    def counts_by(self, name: str) -> dict[str, dict[str, int]]:
        value = self.get(name, dict)
        self.need(all(_maps(counts, int) for counts in value.values()), name, "must map names to maps of numbers")
        return value


def _maps(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(type(item) is kind for item in value.values())


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.40}"
