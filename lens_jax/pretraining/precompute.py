"""`lens-jax precompute`: a data set of images to one of latents and text features, which trains without encoders.

    OUT/<stream>/<number>.array_record   feature records of one shard of the images, those of one class of lengths
    OUT/notes/<split>-<size>-<number>.json    what they were made from (`key`), written when all of them are there
    OUT/index.json                       written when all shards are there

Here the length of every caption is known, so records go to the class that holds the longest of theirs. What is made of
one shard of the images has one number in all classes, its place among the shards of its size and split; a class that
none of its records is in has no file of that number, and a shard of no records in the index. A note's key is a hash of
the shard's records and of all that their features depend on: weights, layers, date, sizes. So a run that was stopped
goes on, and after a change only what changed is made again. Any number of processes share the work without talking to
each other: each takes every n-th shard, and whoever finds all complete writes the index.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lens_jax import parallel
from lens_jax.atomic import write_json
from lens_jax.console import make_console
from lens_jax.data import feature_records
from lens_jax.data.buckets import Bucket
from lens_jax.data.caption_length import check_classes, text_class
from lens_jax.data.config import DataConfig
from lens_jax.data.datasets import DataSets, open_data
from lens_jax.data.feature_records import FeatureRecord
from lens_jax.data.index import (
    FEATURES,
    NAME,
    Index,
    Shard,
    load_index,
    read_source,
    shard_name,
    stream_name,
)
from lens_jax.data.index_writer import IndexWriter
from lens_jax.data.mixture import Shape
from lens_jax.data.records import Record, decode_image
from lens_jax.data.writer import HashedShard
from lens_jax.encoders import kinds
from lens_jax.errors import LensError
from lens_jax.parallel import MeshConfig, processes
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.features import Features, fit_codec

# Lengths that captions are padded to, so that a short one does not cost what the longest does.
_LENGTHS = (64, 128, 256)
# Images of a shard held at a time: with captions of 172 tokens 0.3 GB.
_RECORDS = 64
_MAX_NOTE = 1 << 20
_NOTES = "notes"
_OURS = re.compile(rf"{NAME}|{_NOTES}|(train|validation)-\d+x\d+(-text\d+)?(\.shards)?|.*\.partial-\w+")


@dataclasses.dataclass(frozen=True)
class Precompute:
    """Latents and text features of a data set, so that training on it loads neither autoencoder nor text encoder."""

    # Folder to write. One that is there is gone on with: what in it is still right is kept.
    out: str
    # The data set of images, and its codec and text encoder.
    data: DataConfig
    codec: kinds.Images
    text: kinds.Text
    # Images, or captions, at a time; a multiple of this process's devices.
    batch_size: int = 64
    # What is stored. In bfloat16 a token of GPT-OSS takes 23 kB, and the latents of 1024 x 1024 pixels 1 MB.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # Records whose captions are about as long lie together, so that batches of them pad little: the longest of each
    # class in text tokens, such as 64 128 192 256 415. () is for sets that are small beside a batch.
    caption_classes: tuple[int, ...] = ()
    # Devices of this process that share the text encoder's weights: -1 all of them, 1 none.
    fsdp: int = -1
    # This process makes every `hosts`-th shard, from number `host` on. Without the two the cluster says, or it is one.
    host: int | None = None
    hosts: int | None = None

    def __post_init__(self):
        if self.batch_size < 1:
            raise LensError(f"--batch-size is {self.batch_size}; it must be at least 1")
        if (self.host is None) != (self.hosts is None):
            raise LensError("give both --host and --hosts, or neither")
        if self.hosts is not None and not 0 <= self.host < self.hosts:
            raise LensError(f"--host is {self.host}, --hosts {self.hosts}; hosts count from 0")
        check_classes(self.caption_classes)
        if self.codec.sample:
            raise LensError("codec.sample draws other latents for every epoch; with stored ones it must be off")


def precompute(options: Precompute) -> Path | None:
    """Make this process's shards; the path of the data set once all shards of all processes are there, else None."""
    console = make_console()
    data, source = open_data(options.data), load_index(options.data.path)
    if source.features:
        raise LensError(f"{options.data.path}: holds features already; give the data set of images")
    # They share no collective, and one may be done hours before another: they must not have met.
    host, hosts = processes.part() if options.hosts is None else (options.host, options.hosts)
    run = TrainConfig(codec=options.codec, text=options.text, data=dataclasses.replace(options.data, joint_multiple=1))
    mesh = _local_mesh(options)
    features = Features(run, [Shape(bucket) for bucket in source.buckets], mesh)
    fitted = fit_codec(run, data)
    made = _description(options, source, features, fitted)

    out = Path(options.out)
    _check_target(out)
    tasks = _tasks(source, made, options.caption_classes)
    try:
        (out / _NOTES).mkdir(parents=True, exist_ok=True)
        # Until all is there again nobody may take it for a data set.
        if not all(_finished(out, task) is not None for task in tasks):
            (out / NAME).unlink(missing_ok=True)
    except OSError as error:
        raise LensError(f"{out}: cannot be written: {error.strerror}") from None
    mine = tasks[host::hosts]
    todo = [task for task in mine if _finished(out, task) is None]
    if len(todo) < len(mine):
        console.print(f"{len(mine) - len(todo)} of {len(mine)} shards are there already")
    worker = _Worker(options, features, fitted, mesh)
    with _bar(console) as bar:
        bar_task = bar.add_task("encoding", total=sum(task.shard.records for task in todo))
        for task in todo:
            _make(out, source, task, options.caption_classes, worker, lambda count: bar.advance(bar_task, count))
    done = [_finished(out, task) for task in tasks]
    if any(parts is None for parts in done):
        console.print(f"this process's part is done; {out} becomes a data set when the others have finished theirs")
        return None
    _write_index(out, source, made, options.caption_classes, tasks, done)
    _tidy(out, tasks)
    size = sum(part[1] for parts in done for part in parts.values())
    console.print(f"{sum(task.shard.records for task in tasks):,} records, {size / 1e9:.2f} GB in {out}")
    return out


@dataclasses.dataclass(frozen=True)
class _Task:
    """A shard of images, and where what is made of it goes."""

    shard: Shard
    split: str
    bucket: Bucket
    # Its number among the shards of that split and size.
    number: int
    key: str

    @property
    def note(self) -> str:
        return f"{_NOTES}/{stream_name(self.split, self.bucket, 0)}-{self.number:06d}.json"

    def name(self, most: int) -> str:
        """The shard of the records with captions of at most so many tokens."""
        return shard_name(stream_name(self.split, self.bucket, most), self.number)


# What is made of a task: (records, bytes, sha256) by class of caption lengths.
_Parts = dict[int, tuple[int, int, str]]


def _tasks(source: Index, made: dict[str, Any], classes: tuple[int, ...]) -> list[_Task]:
    tasks, numbers = [], Counter()
    for stream in source.streams:
        place = stream.split, stream.bucket
        for shard in source.shards(stream):
            tasks.append(_Task(shard, *place, numbers[place], _key(made, shard, classes)))
            numbers[place] += 1
    return tasks


def _write_index(
    out: Path, source: Index, made: dict[str, Any], classes: tuple[int, ...], tasks: list[_Task], done: list[_Parts]
) -> None:
    used = defaultdict(set)
    for task, parts in zip(tasks, done):
        used[task.split, task.bucket].update(parts)
    writer = IndexWriter(out)
    for task, parts in zip(tasks, done):
        for most in used[task.split, task.bucket]:
            writer.add(task.split, task.bucket, most, *parts.get(most, (0, 0, hashlib.sha256().hexdigest())))
    kept = "licence", "languages", "holdout_languages", "buckets", "captioned", "dropped", "dropped_by_bucket", "failed"
    writer.finish(
        source=FEATURES,
        config=made,
        caption_classes=classes,
        caption_count="encoder" if classes else "",
        **{name: getattr(source, name) for name in kept},
    )


def _check_target(out: Path) -> None:
    """LensError for a folder of something else: streams here have the names that those of the images have."""
    if not out.exists():
        return
    if not out.is_dir():
        raise LensError(f"--out {out}: exists and is no folder")
    names = {path.name for path in out.iterdir()}
    if NAME in names and read_source(out) != FEATURES:
        raise LensError(f"--out {out}: is a data set of images; give another folder")
    others = sorted(names if _NOTES not in names else (name for name in names if not _OURS.fullmatch(name)))
    if others:
        raise LensError(f"--out {out}: holds {others[0]}, which is not ours; give another folder")


def check_features(config: TrainConfig, data: DataSets) -> None:
    """LensError where stored features were made by other networks than the run's config names."""
    made = data.features
    for name in ("codec", "text"):
        ours = _identity_of(getattr(config, name))
        for field, theirs in made[name].items():
            if ours.get(field) != theirs:
                raise LensError(
                    f"{data.config.paths[0]}: made with {name}.{field} {theirs!r:.60}, the config says "
                    f"{ours.get(field)!r:.60}; precompute again, or change the config"
                )


class _Worker:
    """Encodes images and captions of a bucket, a fixed number at a time."""

    def __init__(self, options: Precompute, features: Features, fitted: dict, mesh):
        self._features, self._fitted, self._size = features, fitted, options.batch_size
        self._dtype, self._longest = feature_records.DTYPES[options.dtype], options.text.max_tokens
        devices = 1 if mesh is None else mesh.size
        if options.batch_size % devices:
            raise LensError(f"--batch-size {options.batch_size}: must be a multiple of the {devices} devices")

    def latents(self, found: list[Record]) -> list[np.ndarray]:
        """[N, C] of each image."""
        pixels = np.stack([decode_image(record) for record in found])
        parts = [
            self._features.latents(self._fitted, _filled(pixels[start : start + self._size], self._size))
            for start in range(0, len(pixels), self._size)
        ]
        return list(np.concatenate(parts)[: len(found)].astype(self._dtype))

    def texts(self, captions: list[str]) -> list[np.ndarray]:
        """[layers, tokens, width] of each caption; equal captions once."""
        unique = list(dict.fromkeys(captions))
        longest, groups = self._longest, defaultdict(list)
        for caption, length in zip(unique, self._features.lengths(unique)):
            groups[next((n for n in _LENGTHS if length <= n < longest), longest)].append(caption)
        found = {}
        for room, members in sorted(groups.items()):
            for start in range(0, len(members), self._size):
                chunk = members[start : start + self._size]
                # Blank captions fill it up: they cost no experts.
                layers, lengths = self._features.text(chunk + [""] * (self._size - len(chunk)), room)
                for row, caption in enumerate(chunk):
                    found[caption] = layers[:, row, : lengths[row]].astype(self._dtype)
        return [found[caption] for caption in captions]


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    """`size` rows, the last one repeated: one shape, so one program."""
    return rows[np.minimum(np.arange(size), len(rows) - 1)]


def _make(out: Path, source: Index, task: _Task, classes: tuple[int, ...], worker: _Worker, advance) -> None:
    """Write what is made of one shard, and then the note that it is complete."""
    shards: dict[int, HashedShard] = {}
    try:
        with source.open(task.shard) as reader:
            for start in range(0, task.shard.records, _RECORDS):
                found = reader.read(range(start, min(start + _RECORDS, task.shard.records)))
                for record in _encoded(found, worker):
                    most = text_class(record.longest, classes)
                    if most not in shards:
                        shards[most] = HashedShard(out / task.name(most), compress=False)
                    shards[most].write(feature_records.encode(record))
                advance(len(found))
        parts = {str(most): shards.pop(most).close() for most in sorted(shards)}
        write_json(out / task.note, {"key": task.key, "parts": parts})
    except OSError as error:
        raise LensError(f"{out / task.note}: cannot be written: {error.strerror}") from None
    finally:
        for shard in shards.values():
            shard.abandon()


def _encoded(found: list[Record], worker: _Worker) -> Iterator[FeatureRecord]:
    captions = [text for record in found for texts in record.captions.values() for text in texts]
    features = iter(worker.texts(captions))
    for record, latents in zip(found, worker.latents(found)):
        texts = {name: tuple(next(features) for _ in texts) for name, texts in record.captions.items()}
        yield FeatureRecord(latents, texts, record.height, record.width, record.source, record.licence)


def _finished(out: Path, task: _Task) -> _Parts | None:
    """What a task's note says, if it was made from the same and the files are as long as it says."""
    path = out / task.note
    try:
        if path.stat().st_size > _MAX_NOTE:
            return None
        note = json.loads(path.read_text(encoding="utf-8"))
        if note["key"] != task.key:
            return None
        parts = {
            int(most): (int(count), int(size), str(sha256)) for most, (count, size, sha256) in note["parts"].items()
        }
        whole = sum(count for count, _, _ in parts.values()) == task.shard.records
        whole &= all((out / task.name(most)).stat().st_size == size for most, (_, size, _) in parts.items())
        return parts if whole and all(len(bytes.fromhex(part[2])) == 32 for part in parts.values()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _tidy(out: Path, tasks: list[_Task]) -> None:
    """Remove what an earlier state of the data set left. Only what we wrote has such names."""
    index = load_index(out)
    notes = {task.note for task in tasks}
    for path in (out / _NOTES).iterdir():
        if f"{_NOTES}/{path.name}" not in notes:
            path.unlink(missing_ok=True)
    known = {stream.name: {Path(shard.name).name for shard in index.shards(stream)} for stream in index.streams}
    for path in out.iterdir():
        if path.suffix == ".shards" and path.stem not in known:
            path.unlink(missing_ok=True)
        if path.is_dir() and path.name != _NOTES:
            for shard in path.iterdir():
                if shard.name not in known.get(path.name, ()):
                    shard.unlink(missing_ok=True)
            if path.name not in known:
                with contextlib.suppress(OSError):  # another process was faster
                    path.rmdir()


def _description(options: Precompute, source: Index, features: Features, fitted: dict) -> dict[str, Any]:
    """What the index says of how the records were made, as JSON."""
    return {
        "of": source.fingerprint,
        "codec": _identity_of(options.codec),
        "text": _identity_of(options.text),
        "weights": features.weights(),
        "dtype": options.dtype,
        "layers": options.text.num_layers,
        "text_width": options.text.width,
        "max_tokens": options.text.max_tokens,
        "fitted": {name: np.asarray(value).tolist() for name, value in fitted.items()},
    }


def _identity_of(config) -> dict[str, Any]:
    """The fields of a codec or text encoder that its output depends on, as JSON gives them back."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    return {
        "kind": type(config).__name__,
        **{k: v for k, v in values.items() if k not in ("path", "tokenizer", "sample")},
    }


def _key(made: dict[str, Any], shard: Shard, classes: tuple[int, ...]) -> str:
    """Of a shard's records and of all that their features depend on. `of` is the whole data set: not that."""
    relevant = {name: value for name, value in made.items() if name != "of"}
    return hashlib.sha256(json.dumps([shard.sha256, relevant, classes], sort_keys=True).encode()).hexdigest()


def _local_mesh(options: Precompute):
    """Processes work apart from each other, so each has a mesh of its own devices."""
    devices = jax.local_devices()
    shape = MeshConfig(data=1 if options.fsdp == -1 else -1, fsdp=options.fsdp)
    return parallel.make_mesh(shape, devices) if len(devices) > 1 else None


class _Rate(ProgressColumn):
    """Images a second."""

    def render(self, task) -> Text:
        return Text(f"{task.speed:.3g}/s" if task.speed else "")


def _bar(console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        _Rate(), console=console,
    )  # fmt: skip
