"""`lens-jax precompute`: a data set of images to one of latents and text features, which trains without encoders.

    OUT/<shard of the data set>      feature records, one for each of the shard's records, in their order
    OUT/<shard>.json                 what it was made from (`key`), written when the shard is complete
    OUT/manifest.json                written when all shards are there

A shard's key is a hash of its records and of all that its features depend on: weights, layers, date, sizes. So a run
that was stopped goes on, and after a change only what changed is made again. Any number of processes share the work
without talking to each other: each takes every n-th shard, and whoever finds all complete writes the manifest.
"""

import dataclasses
import hashlib
import json
import os
from collections import defaultdict
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
from lens_jax.console import make_console
from lens_jax.data import feature_records
from lens_jax.data.feature_records import FeatureRecord
from lens_jax.data.manifest import (
    FEATURES,
    NAME,
    Manifest,
    Shard,
    fingerprint,
    load_manifest,
    read_source,
    write_manifest,
)
from lens_jax.data.pipeline import DataConfig, check_buckets
from lens_jax.data.records import Record, decode_image
from lens_jax.data.shards import ShardReader, ShardWriter
from lens_jax.encoders.frozen import FluxCodecConfig, GptOssTextConfig
from lens_jax.encoders.pixels import PixelCodecConfig
from lens_jax.encoders.sentence import SentenceEncoderConfig
from lens_jax.errors import LensError
from lens_jax.parallel import MeshConfig, processes
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.features import Features, fit_codec

# Lengths that captions are padded to, so that a short one does not cost what the longest does.
_LENGTHS = (64, 128, 256)
# Images of a shard held at a time: with captions of 172 tokens 0.3 GB.
_RECORDS = 64
_MAX_NOTE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Precompute:
    """Latents and text features of a data set, so that training on it loads neither autoencoder nor text encoder."""

    # Folder to write. One that is there is gone on with: what in it is still right is kept.
    out: str
    # The data set of images, and its codec and text encoder.
    data: DataConfig
    codec: PixelCodecConfig | FluxCodecConfig
    text: SentenceEncoderConfig | GptOssTextConfig
    # Images, or captions, at a time; a multiple of this process's devices.
    batch_size: int = 64
    # What is stored. In bfloat16 a token of GPT-OSS takes 23 kB, and the latents of 1024 x 1024 pixels 1 MB.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
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
        if isinstance(self.codec, FluxCodecConfig) and self.codec.sample:
            raise LensError("codec.sample draws other latents for every epoch; with stored ones it must be off")


def precompute(options: Precompute) -> Path | None:
    """Make this process's shards; the path of the data set once all shards of all processes are there, else None."""
    console = make_console()
    source = load_manifest(options.data.path)
    if source.features:
        raise LensError(f"{options.data.path}: holds features already; give the data set of images")
    check_buckets(options.data, source)
    # They share no collective, and one may be done hours before another: they must not have met.
    host, hosts = processes.part() if options.hosts is None else (options.host, options.hosts)
    run = TrainConfig(codec=options.codec, text=options.text, data=dataclasses.replace(options.data, joint_multiple=1))
    mesh = _local_mesh(options)
    features = Features(run, source.buckets, mesh)
    fitted = fit_codec(run)
    made = _description(options, source, features, fitted)
    keys = [_key(made, shard) for shard in source.shards]

    out = Path(options.out)
    _check_target(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Until all is there again nobody may take it for a data set.
        if not _complete(out, source, keys):
            (out / NAME).unlink(missing_ok=True)
    except OSError as error:
        raise LensError(f"{out}: cannot be written: {error.strerror}") from None
    mine = [(shard, key) for shard, key in zip(source.shards, keys)][host::hosts]
    todo = [(shard, key) for shard, key in mine if _finished(out, shard, key) is None]
    if len(todo) < len(mine):
        console.print(f"{len(mine) - len(todo)} of {len(mine)} shards are there already")
    total = sum(shard.records for shard, _ in todo)
    worker = _Worker(options, features, fitted, mesh)
    with _bar(console) as bar:
        task = bar.add_task("encoding", total=total)
        for shard, key in todo:
            _make_shard(out, source, shard, key, worker, lambda count: bar.advance(task, count))
    if not _complete(out, source, keys):
        console.print(f"this process's part is done; {out} becomes a data set when the others have finished theirs")
        return None
    shards = tuple(_finished(out, shard, key) for shard, key in zip(source.shards, keys))
    write_manifest(dataclasses.replace(source, directory=out, source=FEATURES, config=made, shards=shards))
    _tidy(out, source)
    size = sum(shard.bytes for shard in shards)
    console.print(f"{sum(s.records for s in shards):,} records, {size / 1e9:.2f} GB in {out}")
    return out


def _check_target(out: Path) -> None:
    """LensError for a folder of something else: shards here have the names that those of the images have."""
    if not out.exists():
        return
    if not out.is_dir():
        raise LensError(f"--out {out}: exists and is no folder")
    names = {path.name for path in out.iterdir()}
    if NAME in names and read_source(out) != FEATURES:
        raise LensError(f"--out {out}: is a data set of images; give another folder")
    ours = (".array_record", ".array_record.json", ".partial")
    others = sorted(name for name in names - {NAME} if not name.endswith(ours))
    if others:
        raise LensError(f"--out {out}: holds {others[0]}, which is not ours; give another folder")


def check_features(config: TrainConfig, manifest: Manifest) -> None:
    """LensError where stored features were made by other networks than the run's config names."""
    made = manifest.features
    for name in ("codec", "text"):
        ours = _identity_of(getattr(config, name))
        for field, theirs in made[name].items():
            if ours.get(field) != theirs:
                raise LensError(
                    f"{manifest.directory}: made with {name}.{field} {theirs!r:.60}, the config says "
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


def _make_shard(out: Path, source: Manifest, shard: Shard, key: str, worker: _Worker, advance) -> None:
    """Write one shard and then the note that it is complete."""
    digest = hashlib.sha256()
    try:
        reader = ShardReader(source.directory / shard.name, shard.records)
        with reader, ShardWriter(out / shard.name, compress=False) as writer:
            for start in range(0, shard.records, _RECORDS):
                found = reader.read(range(start, min(start + _RECORDS, shard.records)))
                for record in _encoded(found, worker):
                    entry = feature_records.encode(record)
                    writer.write_entry(entry)
                    digest.update(len(entry).to_bytes(8, "big") + entry)
                advance(len(found))
        size = (out / shard.name).stat().st_size
        note = dataclasses.asdict(dataclasses.replace(shard, bytes=size, sha256=digest.hexdigest()))
        partial = out / f"{shard.name}.json.partial"
        partial.write_text(json.dumps({"key": key, "shard": note}), encoding="utf-8")
        os.replace(partial, out / f"{shard.name}.json")
    except OSError as error:
        raise LensError(f"{out / shard.name}: cannot be written: {error.strerror}") from None


def _encoded(found: list[Record], worker: _Worker) -> Iterator[FeatureRecord]:
    captions = [text for record in found for texts in record.captions.values() for text in texts]
    features = iter(worker.texts(captions))
    for record, latents in zip(found, worker.latents(found)):
        texts = {name: tuple(next(features) for _ in texts) for name, texts in record.captions.items()}
        yield FeatureRecord(latents, texts, record.height, record.width, record.source, record.licence)


def _finished(out: Path, shard: Shard, key: str) -> Shard | None:
    """What a shard's note says, if it was made from the same and the file is as long as it says."""
    path = out / f"{shard.name}.json"
    try:
        if path.stat().st_size > _MAX_NOTE:
            return None
        note = json.loads(path.read_text(encoding="utf-8"))
        made = Shard(**note["shard"])
        same = note["key"] == key and made == dataclasses.replace(shard, bytes=made.bytes, sha256=made.sha256)
        return made if same and (out / made.name).stat().st_size == made.bytes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _complete(out: Path, source: Manifest, keys: list[str]) -> bool:
    return all(_finished(out, shard, key) for shard, key in zip(source.shards, keys))


def _tidy(out: Path, source: Manifest) -> None:
    """Remove shards of an earlier state of the data set. Only what we wrote has such names."""
    known = {shard.name for shard in source.shards}
    for note in out.glob("*.array_record.json"):
        name = note.name.removesuffix(".json")
        if name not in known:
            (out / name).unlink(missing_ok=True)
            note.unlink()


def _description(options: Precompute, source: Manifest, features: Features, fitted: dict) -> dict[str, Any]:
    """What the manifest says of how the records were made, as JSON."""
    return {
        "of": fingerprint(source),
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
    return {"kind": type(config).__name__, **{k: v for k, v in values.items() if k not in ("path", "sample")}}


def _key(made: dict[str, Any], shard: Shard) -> str:
    """Of a shard's records and of what its features depend on. `of` is the whole data set: not that."""
    relevant = {name: value for name, value in made.items() if name != "of"}
    return hashlib.sha256(json.dumps([shard.sha256, relevant], sort_keys=True).encode()).hexdigest()


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
