"""The stage `write`: kept images at the size of their bucket, with their captions, as the shards of a data set.

It is run on groups of units. A group's shards bear numbers that only it has, each appears under its name when it is
whole, and the table of the group, written last, has a row for each of its images. Then `manifest.py` writes the index.
An image is stored once, at the largest bucket that it covers; training with `data.areas all` makes the smaller ones of
its shape of it.
"""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lens_jax import __version__
from lens_jax.data import caption_length, images, records
from lens_jax.data.buckets import Bucket, fit_image, parse_bucket, parse_buckets
from lens_jax.data.engine.config import EngineConfig, Source
from lens_jax.data.engine.decode import Limits, Undecodable, decode
from lens_jax.data.engine.groups import is_captioned, shards_a_group
from lens_jax.data.engine.readers import Item, Problem
from lens_jax.data.engine.stage import StopRun, UnitInput
from lens_jax.data.engine.tables import ID
from lens_jax.data.engine.threads import in_order
from lens_jax.data.engine.unit import Unit
from lens_jax.data.index import shard_name, stream_name
from lens_jax.data.shards import ShardReader
from lens_jax.data.writer import SHARD_BYTES, HashedShard
from lens_jax.errors import LensError

WRITTEN = pa.schema(
    [
        pa.field("id", ID, nullable=False),
        ("problem", pa.string()),  # null where it is written
        ("detail", pa.string()),
        ("split", pa.string()),
        ("bucket", pa.string()),
        ("text_class", pa.int32()),
        ("shard", pa.int32()),  # its number in its stream
        ("position", pa.int32()),  # in the shard
        ("languages", pa.list_(pa.string())),
        ("shard_bytes", pa.int64()),  # of the shard, with its first image
        ("shard_sha256", pa.binary(32)),
    ]
)
# One image in so many is decoded again before it is written.
VERIFIED = 100
# Brief captions are a language of their own, as BCP 47 has it for private use.
BRIEF = "-x-brief"
FINE = ("ok", "done")


@dataclass(frozen=True)
class Write:
    """The stage; `members` are the units of every group, by the id of the group's unit (`groups.by_unit`)."""

    captioned: bool
    members: Mapping[str, tuple[Unit, ...]] = dataclasses.field(default_factory=dict, repr=False)
    # Decode all again, and read every shard once it is closed. Changes nothing that is written.
    verify: bool = False

    name = "write"
    version = 1
    by_item = False

    @property
    def reads(self) -> tuple[str, ...]:
        return ("probe", "measure", "score", "select") + (("caption",) if self.captioned else ())

    def reads_of(self, config: EngineConfig, unit: Unit) -> tuple[str, ...]:
        """The stages whose tables there are of a unit: sources that keep their captions get no others."""
        return self.reads if is_captioned(config, unit.source) else self.reads[:4]

    def settings(self, config: EngineConfig) -> Mapping[str, object]:
        return {
            "buckets": config.buckets,
            "encoding": config.encoding,
            "caption_classes": config.caption_classes,
            "group_bytes": config.group_bytes,
            "sources": {source.name: [source.caption, source.licence] for source in config.sources},
        }

    def open(self, config: EngineConfig) -> Callable[[Unit, Sequence[UnitInput]], pa.Table]:
        """The function is of a group's unit and of what there is of its members."""
        check_encoding(config)
        return lambda group, given: write_group(config, group, given, self.verify)


def check_encoding(config: EngineConfig) -> None:
    """LensError where nothing that is written in a bucket could be read again."""
    side = images.ENCODINGS[config.encoding]
    for bucket in parse_buckets(config.buckets):
        if bucket.height * bucket.width > images.MAX_PIXELS or max(bucket.height, bucket.width) > side:
            limits = f"at most {images.MAX_PIXELS} pixels, and sides of {side} in {config.encoding}"
            raise LensError(f"bucket {bucket}: {limits}")


def write_group(config: EngineConfig, group: Unit, given: Sequence[UnitInput], verify: bool = False) -> pa.Table:
    """Write the shards of a group; its table WRITTEN, with a row for each image that was to be kept.

    LensError where a source is not what it was, and where a shard does not hold what was written.
    """
    shards = _Shards(Path(config.out) / group.source, group.part, shards_a_group(config), verify)
    rows: list[dict[str, object]] = []
    try:
        for unit in given:
            function = lambda task, source=unit.source: _fit(config, source, *task, verify)
            fitted = in_order(function, _tasks(unit), lambda task: len(getattr(task[1], "data", b"")))
            rows.extend(shards.write(result) if isinstance(result, Fitted) else result for result in fitted)
        shards.close()
    except BaseException:
        shards.abandon()
        raise
    for name, (size, sha256) in shards.done.items():
        shards.first[name] |= {"shard_bytes": size, "shard_sha256": sha256}
    return pa.Table.from_pylist(rows, WRITTEN)


@dataclass(frozen=True)
class Fitted:
    """A record that is ready to be stored."""

    id: bytes
    split: str
    bucket: Bucket
    text_class: int
    entry: bytes
    languages: tuple[str, ...]


def _tasks(unit: UnitInput):
    """(row of all tables, item) of each image that is kept."""
    kept = unit.tables["select"]["kept"].to_pylist()
    rows = _rows(unit)
    for index, item in unit.items():
        if kept[index]:
            yield rows(index), item


def _rows(unit: UnitInput) -> Callable[[int], dict[str, object]]:
    """What the tables say of an image, in one map; captions under `captions`."""
    tables = [unit.tables[name] for name in ("probe", "measure", "score", "select")]
    captions: dict[bytes, list[dict]] = {}
    for row in unit.tables["caption"].to_pylist() if "caption" in unit.tables else ():
        captions.setdefault(row["id"], []).append(row)

    def row(index: int) -> dict[str, object]:
        found = {}
        for table in reversed(tables):  # of columns that several have, such as `problem`, the probe's is meant
            (values,) = table.slice(index, 1).to_pylist()
            found |= values
        return found | {"captions": captions.get(found["id"], [])}

    return row


def _fit(
    config: EngineConfig, source: Source, row: Mapping, item: Item | Problem, verify: bool
) -> Fitted | dict[str, object]:
    """The record of an image, or the row of one that cannot be written after all."""
    lost = lambda problem, detail="": {"id": row["id"], "problem": problem, "detail": detail[:300]}
    if isinstance(item, Problem):
        return lost(item.reason, item.detail)
    if hashlib.sha256(item.data).digest() != row["sha256"]:
        raise LensError(f"{item.key:.200}: the file is not what it was when it was probed; choose another work folder")
    texts, written = captions_of(source, row["captions"], item)
    if not texts:
        return lost("no caption", _why_none(row["captions"]))
    bucket = parse_bucket(row["bucket"])
    try:
        pixels = _fitted(config, item.data, bucket)
        record = records.Record(
            image=images.encode_image(pixels, config.encoding),
            captions=texts,
            height=bucket.height,
            width=bucket.width,
            source=item.key,
            licence=item.licence or source.licence,
            meta=_meta(source, row, item, written),
        )
        entry = records.encode(record)
        if verify or int.from_bytes(row["id"][:4], "big") % VERIFIED == 0:
            records.decode_image(records.decode(entry, item.key))
    except Undecodable as error:
        return lost(error.reason, error.detail)
    except LensError as error:
        return lost("cannot be stored", str(error))
    most = 0
    if config.caption_classes:
        longest = caption_length.longest(texts.values(), caption_length.estimate)
        most = caption_length.text_class(longest, config.caption_classes)
    return Fitted(row["id"], row["split"], bucket, most, entry, tuple(texts))


def _fitted(config: EngineConfig, data: bytes, bucket: Bucket):
    from PIL import Image

    pixels = decode(data, Limits(config.max_pixels, config.max_bytes, config.strict_jpeg))
    return fit_image(Image.fromarray(pixels), bucket)


def captions_of(
    source: Source, rows: Sequence[Mapping], item: Item
) -> tuple[dict[str, tuple[str, ...]], Mapping[str, object]]:
    """(captions by language, a row of them that says which model wrote them) of an image.

    Those that it came with where its source keeps them, or else those that were written and passed; brief ones as the
    language en-x-brief. Never one in place of another: it may have none.
    """
    if source.caption == "keep":
        return dict(item.texts), {}
    fine = [row for row in rows if row["text"] and row["status"] in FINE]
    if source.caption == "brief":
        fine = [row for row in fine if row["kind"] == "brief"]
    texts: dict[str, list[str]] = {}
    for row in fine:
        language = (row["language"] or "en") + (BRIEF if row["kind"] == "brief" else "")
        texts.setdefault(language, []).append(row["text"])
    return {language: tuple(lines) for language, lines in texts.items()}, fine[0] if fine else {}


def _why_none(rows: Sequence[Mapping]) -> str:
    return ", ".join(sorted({str(row["status"]) for row in rows})) or "none was asked for, or it brings none"


def _meta(source: Source, row: Mapping, item: Item, caption: Mapping) -> dict[str, object]:
    """What an evaluator may want to know of an image. What is not known is not there."""
    alt = [line for lines in item.texts.values() for line in lines] if source.caption != "keep" else []
    values = {
        "id": row["id"].hex(),
        "key": item.key,
        "sha256": row["sha256"].hex(),
        "url": item.url or None,
        "original_height": row["height"],
        "original_width": row["width"],
        "alt_text": alt[0] if len(alt) == 1 else alt or None,
        **{name: row[name] for name in ("laplacian", "entropy", "luminance", "nsfw", "aesthetic", "watermark")},
        "caption_model": caption.get("model"),
        "caption_prompt": caption.get("prompt_version"),
        "engine": f"lens-jax {__version__}",
    }
    # What is known here goes before what the source says under the same name.
    return {**item.meta, **{name: value for name, value in values.items() if not _is_missing(value)}}


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


@contextlib.contextmanager
def _storing(directory: Path):
    """What cannot be written here cannot be for the next group either."""
    try:
        yield
    except LensError as error:
        raise StopRun(str(error)) from None
    except OSError as error:
        raise StopRun(f"{directory}: cannot be written: {error.strerror}") from None


class _Shards:
    """The shards of a group while they are written: of each stream one is open."""

    def __init__(self, directory: Path, group: int, most: int, verify: bool):
        self._directory, self._group, self._most, self._verify = directory, group, most, verify
        self._open: dict[tuple[str, Bucket, int], HashedShard] = {}
        self._part: dict[tuple[str, Bucket, int], int] = {}
        self._records: dict[str, int] = {}
        # By the shard's name: (bytes, sha256) once it is closed, and the row of its first image.
        self.done: dict[str, tuple[int, bytes]] = {}
        self.first: dict[str, dict[str, object]] = {}

    def write(self, fitted: Fitted) -> dict[str, object]:
        """Append a record; its row of WRITTEN."""
        key = fitted.split, fitted.bucket, fitted.text_class
        number = self._group * self._most + self._part.setdefault(key, 0)
        name = shard_name(stream_name(*key), number)
        if key not in self._open:
            # Images hardly shrink.
            with _storing(self._directory):
                self._open[key] = HashedShard(self._directory / name, compress=False)
            self._records[name] = 0
        row = {
            "id": fitted.id,
            "split": fitted.split,
            "bucket": str(fitted.bucket),
            "text_class": fitted.text_class,
            "shard": number,
            "position": self._records[name],
            "languages": list(fitted.languages),
        }
        self.first.setdefault(name, row)
        with _storing(self._directory):
            self._open[key].write(fitted.entry)
        self._records[name] += 1
        if self._open[key].written >= SHARD_BYTES and self._part[key] < self._most - 1:
            self._close(key)
            self._part[key] += 1
        return row

    def close(self) -> None:
        """Give all their names."""
        for key in list(self._open):
            self._close(key)

    def _close(self, key: tuple[str, Bucket, int]) -> None:
        name = shard_name(stream_name(*key), self._group * self._most + self._part[key])
        with _storing(self._directory):
            count, size, sha256 = self._open.pop(key).close()
        self.done[name] = size, bytes.fromhex(sha256)
        with ShardReader(self._directory / name, count, size) as reader:
            for position in range(count) if self._verify else ():
                records.decode_image(*reader.read([position]), f"{self._directory / name}[{position}]")

    def abandon(self) -> None:
        for shard in self._open.values():
            shard.abandon()
