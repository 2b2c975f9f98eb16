"""The index: what it costs does not grow with the shards, and whatever is wrong with it is named."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lens_jax.data.buckets import LENS_PRETRAINING, Bucket
from lens_jax.data.index import MAGIC, NAME, load_index
from lens_jax.data.index_writer import IndexWriter
from lens_jax.data.prepare_scenes import OpenMojiConfig, prepare_openmoji
from lens_jax.data.records import Record, encode
from lens_jax.data.writer import DataWriter
from lens_jax.errors import LensError

HEADER = {"source": "folder", "config": {}, "licence": "CC0", "languages": ("en",), "holdout_languages": ()}
CLASSES = (64, 128, 192, 256, 415)


def simulated(directory, shards: int, records: int = 1500):
    """The index of a data set of the report's buckets whose shards need not exist."""
    writer = IndexWriter(directory)
    keys = [("train", bucket, most) for bucket in LENS_PRETRAINING for most in CLASSES]
    for number in range(shards):
        digest = hashlib.sha256(number.to_bytes(8, "little")).hexdigest()
        writer.add(*keys[number % len(keys)], records + number % 7, 256 << 20, digest)
    return writer.finish(LENS_PRETRAINING, **HEADER, captioned={}, caption_classes=CLASSES, caption_count="estimate")


def test_shards_cost_nothing_until_they_are_read(tmp_path, monkeypatch):
    """None of 2,700 shards is there. Loading touches the header alone, a stream its table."""
    written = simulated(tmp_path, 2700)
    touched = []
    for name in ("stat", "open", "read_bytes"):
        original = getattr(Path, name)
        spy = lambda self, *args, _original=original, **named: (
            touched.append(self.name) or _original(self, *args, **named)
        )
        monkeypatch.setattr(Path, name, spy)
    index = load_index(tmp_path)
    assert set(touched) == {NAME}
    assert index == written
    assert (tmp_path / NAME).stat().st_size < 64_000
    touched.clear()
    stream = index.streams[7]
    for _ in range(2):
        assert index.shard_records(stream).sum() == stream.records
        assert index.shard(stream, 3).records == index.shard_records(stream)[3]
    assert set(touched) == {f"{stream.name}.shards"}
    assert touched.count(f"{stream.name}.shards") <= 3
    assert sum(index.counts("train")) == sum(1500 + number % 7 for number in range(2700))
    assert index.shard(stream, 3).name == "train-672x384-text192/000003.array_record"
    with pytest.raises(LensError, match=r"train-672x384-text192/000003.array_record: no such shard"):
        index.open(index.shard(stream, 3))


def test_fingerprints_know_records_and_order_but_no_path(tmp_path):
    def write(name, shards, **changes):
        (tmp_path / name).mkdir()
        writer = IndexWriter(tmp_path / name)
        for number in shards:
            writer.add("train", Bucket(32, 32), 0, 5, changes.get("size", 100) + number, f"{number:064x}")
        index = writer.finish([Bucket(32, 32)], **{**HEADER, "captioned": {}})
        assert load_index(tmp_path / name).fingerprint == index.fingerprint
        return index.fingerprint

    same = write("a", [1, 2, 3])
    assert write("b", [1, 2, 3], size=200) == same  # another container around the same records
    assert len({same, write("c", [1, 3, 2]), write("d", [1, 2]), write("e", [1, 2, 4])}) == 4


def test_nothing_looks_like_a_data_set_before_the_end(tmp_path):
    writer = IndexWriter(tmp_path)
    for number in range(3000):
        writer.add("train", Bucket(32, 32), 0, 5, 100, f"{number:064x}")
    assert all(".partial-" in path.name for path in tmp_path.iterdir())
    with pytest.raises(LensError, match="no data set"):
        load_index(tmp_path)
    writer.finish([Bucket(32, 32)], **HEADER, captioned={})
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, "train-32x32.shards"]
    assert (tmp_path / "train-32x32.shards").stat().st_size == len(MAGIC) + 3000 * 48


def test_records_go_to_streams_and_shards_close_when_they_are_full(tmp_path):
    buckets = (Bucket(6, 9), Bucket(9, 6))
    entry = lambda n: encode(Record(image=bytes([n]) * 400, captions={"en": ("x",)}, height=6, width=9, source=str(n)))
    with DataWriter(tmp_path, buckets, shard_bytes=1000) as writer:
        for n in range(20):
            writer.write("train", buckets[0], (0, 128, 64)[n % 3], entry(n), ["en"])
        writer.write("validation", buckets[0], 0, entry(20), ["en"])
        writer.finish(**HEADER)
    index = load_index(tmp_path)
    assert [(s.split, s.text_class, s.records, s.shards) for s in index.streams] == [
        ("train", 64, 6, 2), ("train", 128, 7, 3), ("train", 0, 7, 3), ("validation", 0, 1, 1),
    ]  # fmt: skip
    assert [int(r.source) for r in index.records("train")] == [*range(2, 20, 3), *range(1, 20, 3), *range(0, 20, 3)]
    assert index.counts("train") == (20, 0)
    assert index.captioned == {"train": {"en": 20}, "validation": {"en": 1}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config = OpenMojiConfig(
        out=str(tmp_path_factory.mktemp("data") / "set"), concepts=3, size=24, tile=4, scenes=9, copies=1, validation=2
    )
    return prepare_openmoji(config, progress=False)


def test_damage_is_named(data, tmp_path):
    with pytest.raises(LensError, match="lens-jax prepare openmoji"):
        load_index(tmp_path / "none")
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    index = load_index(copy)
    assert index.fingerprint == load_index(data).fingerprint
    stream = index.streams[0]
    shard = copy / index.shard(stream, 0).name
    content = shard.read_bytes()
    read = lambda: list(load_index(copy).records("train"))

    shard.write_bytes(content[:-65_536])
    with pytest.raises(LensError, match=f"{shard.name}.*truncated"):
        read()
    shard.unlink()
    for look in (read, load_index(copy).check):
        with pytest.raises(LensError, match=f"{shard.name}: no such shard"):
            look()
    shard.write_bytes(content)
    assert load_index(copy).check() == sum(stream.shards for stream in index.streams)
    assert len(read()) == sum(index.counts("train"))

    table = copy / f"{stream.name}.shards"
    content = table.read_bytes()
    for bad, words in ((content[:-1], "truncated"), (content[:-1] + b"\1", "sha256")):
        table.write_bytes(bad)
        with pytest.raises(LensError, match=rf"{table.name}: .*{words}"):
            read()
    table.unlink()
    with pytest.raises(LensError, match=rf"{table.name}: cannot be read: No such file"):
        read()


def test_a_table_that_lies_is_refused(tmp_path):
    """Hostile numbers, with digests that fit them."""
    for rows in ([-5, 10], [1 << 62, 5], [2, 2]):
        writer = IndexWriter(tmp_path)
        for count in rows:
            writer.add("train", Bucket(32, 32), 0, count, 100, "00" * 32)
        if sum(rows) > 1 << 40:
            writer._tables["train", Bucket(32, 32), 0].records = 5
        if sum(rows) == 4:
            writer._tables["train", Bucket(32, 32), 0].records = 5
        writer.finish([Bucket(32, 32)], **HEADER, captioned={})
        index = load_index(tmp_path)
        with pytest.raises(LensError, match="do not add up to 5"):
            index.shard_records(index.streams[0])


def every_damage(value):
    """(path, copy with one field taken away or of another kind) for all fields of a JSON value."""
    kinds = (None, -1, "x", [], {}, [None], {"a": None}, 1.5)
    if isinstance(value, dict):
        for key, item in value.items():
            yield (key,), {k: v for k, v in value.items() if k != key}
            for path, changed in every_damage(item):
                yield (key, *path), {**value, key: changed}
            yield from (((key,), {**value, key: kind}) for kind in kinds)
    elif isinstance(value, list):
        for i, item in enumerate(value[:1]):
            for path, changed in every_damage(item):
                yield (i, *path), [*value[:i], changed, *value[i + 1 :]]
            yield from (((i,), [*value[:i], kind, *value[i + 1 :]]) for kind in kinds)


FEATURES = {
    "of": "0" * 16, "codec": {"kind": "LinearCodecConfig", "patch": 4}, "text": {"kind": "SentenceEncoderConfig"},
    "weights": {"autoencoder": "abc"}, "dtype": "float32", "layers": 1, "text_width": 8, "max_tokens": 4,
    "fitted": {"mean": [[0.5, 1.5]]},
}  # fmt: skip


@pytest.mark.parametrize("config", [FEATURES, None], ids=["features", "images"])
def test_every_field_of_a_header_is_checked(data, tmp_path, config):
    """Another kind of value, or none, is an index that works or a line that names the file; never a traceback."""
    header = json.loads((data / NAME).read_text())
    header["failed"] = [{"file": "a", "reason": "b", "detail": "c"}]
    if config:
        header |= {"source": "features", "config": config}
    path = tmp_path / NAME
    path.write_text(json.dumps(header))
    good = load_index(tmp_path)
    assert good.features == config
    refused, messages = set(), []
    for where, changed in every_damage(header):
        path.write_text(json.dumps(changed))
        try:
            index = load_index(tmp_path)
            _use(index)
        except LensError as error:
            refused.add(where if where[0] == "config" else where[0])
            messages.append(str(error))
    assert all(NAME in message and "\n" not in message for message in messages)
    assert refused >= set(header) - {"failed", "config", "dropped", "dropped_by_bucket", "caption_count"}
    if config:
        assert {where[1] for where in refused if isinstance(where, tuple) and len(where) > 1} == set(FEATURES)
    for bad in ("", "[]", "[" * 100_000, json.dumps(header | {"version": 9}), "{" + json.dumps(header)[1:200]):
        path.write_text(bad)
        with pytest.raises(LensError, match=NAME):
            load_index(tmp_path)
    with open(path, "w") as file:
        os.truncate(file.fileno(), 1 << 40)
    with pytest.raises(LensError, match="over 16777216 bytes"):
        load_index(tmp_path)


def _use(index):
    """All that callers take out of a header."""
    assert all(isinstance(n, int) for n in (*index.counts("train"), *index.dropped.values()))
    assert all(isinstance(entry["file"], str) for entry in index.failed if "file" in entry)
    if made := index.features:
        assert made["layers"] * made["text_width"] * made["max_tokens"] > 0
        assert made["codec"]["kind"] + made["text"]["kind"] + made["dtype"]
        assert all(np.array(value, np.float32).dtype == np.float32 for value in made["fitted"].values())
    elif index.source == "openmoji":
        int(index.config["concepts"])
