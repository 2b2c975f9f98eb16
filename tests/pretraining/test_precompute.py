"""Stored latents and features train as those computed on the way do; making them can be stopped and shared."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lens_jax import cli
from lens_jax.data import feature_records
from lens_jax.data.buckets import Bucket
from lens_jax.data.index import NAME, load_index
from lens_jax.data.mixture import Feed
from lens_jax.data.reader import RecordReader
from lens_jax.errors import LensError
from lens_jax.inference.pipeline import LensPipeline
from lens_jax.pretraining.config import SheetConfig, ValidationConfig
from lens_jax.pretraining.job import train
from lens_jax.pretraining.precompute import Precompute, precompute
from lens_jax.run.log import read_metrics

SMALL = ["--codec.patch", "4", "--codec.components", "48"]


def options(config, out, **others) -> Precompute:
    return Precompute(str(out), config.data, config.codec, config.text, batch_size=8, dtype="float32", **others)


def losses(config, out) -> list:
    """Of four updates of one batch, and of one held-out batch."""
    short = {"steps": 4, "accumulation": 1, "validation": ValidationConfig(every=4, batches=1)}
    train(dataclasses.replace(config, out=str(out), **short))
    kinds = ("train", "validation")
    return [record["loss"] for kind in kinds for record in read_metrics(out / "metrics.jsonl", kind)]


@pytest.fixture(scope="module")
def stored(small_lens, tmp_path_factory):
    return precompute(options(small_lens, tmp_path_factory.mktemp("data") / "features"))


@pytest.fixture
def same_order(monkeypatch):
    """The order of images follows from the data set's fingerprint; here from their size, so that losses compare."""
    monkeypatch.setattr(Feed, "key", property(lambda self: self.shape.bucket.height))


@pytest.mark.slow
def test_training_on_them_is_the_same(small_lens, stored, tmp_path, same_order):
    """The released networks; what differs is how many rows a product had."""
    cached = dataclasses.replace(small_lens, data=dataclasses.replace(small_lens.data, path=str(stored)))
    undrawn = dataclasses.replace(small_lens, samples=SheetConfig(every=0))
    np.testing.assert_allclose(losses(cached, tmp_path / "a"), losses(undrawn, tmp_path / "b"), rtol=1e-5)
    assert (tmp_path / "a" / "samples").is_dir()
    LensPipeline.from_pretrained(tmp_path / "a")("a cat", num_inference_steps=1, height=32, width=32)


def test_pixels_and_sentence_vectors_too(tiny_config, tmp_path, same_order):
    data = precompute(options(tiny_config, tmp_path / "features"))
    undrawn = dataclasses.replace(tiny_config, samples=SheetConfig(every=0))
    cached = dataclasses.replace(undrawn, data=dataclasses.replace(tiny_config.data, path=str(data)))
    np.testing.assert_allclose(losses(cached, tmp_path / "a"), losses(undrawn, tmp_path / "b"), rtol=1e-6)


@pytest.mark.slow
def test_stopped_shared_and_changed(small_lens, stored, tmp_path, capsys):
    """Two processes halve the shards; what is damaged or was made otherwise is made again, and nothing else."""
    out = tmp_path / "features"
    assert precompute(options(small_lens, out, host=0, hosts=2)) is None
    with pytest.raises(LensError, match="no data set at"):
        load_index(out)
    assert precompute(options(small_lens, out, host=1, hosts=2)) == out
    assert load_index(out).fingerprint == load_index(stored).fingerprint

    first, second, *_ = shards(out)
    times = {name: (out / name).stat().st_mtime_ns for name in shards(out)}
    (out / first).write_bytes((out / first).read_bytes()[:-1])
    (out / "notes" / second.replace("/", "-").replace(".array_record", ".json")).write_text("{")
    (out / "train-8x8-text4").mkdir()  # of an earlier state
    (out / "train-8x8-text4" / "000000.array_record").touch()
    precompute(options(small_lens, out))
    assert {name for name in times if (out / name).stat().st_mtime_ns != times[name]} == {first, second}
    assert not (out / "train-8x8-text4").exists()
    capsys.readouterr()
    precompute(options(small_lens, out))
    assert f"{len(times)} of {len(times)} shards are there already" in capsys.readouterr().out
    # Another date is other features.
    other = dataclasses.replace(small_lens, text=dataclasses.replace(small_lens.text, date="2030-01-01"))
    precompute(options(other, out))
    assert not set(shards(out).values()) & set(shards(stored).values())


def shards(path) -> dict[str, str]:
    """Name and sha256 of all shards with records."""
    index = load_index(path)
    return {shard.name: shard.sha256 for stream in index.streams for shard in index.shards(stream)}


def test_records_go_to_the_class_of_their_longest_caption(tiny_config, tmp_path):
    """Two processes write the streams of four classes, one of them empty in every size; all records are there once."""
    whole = precompute(options(tiny_config, tmp_path / "whole"))
    out, classes = tmp_path / "classes", (1, 3, 100)
    for host in (1, 0):
        precompute(options(tiny_config, out, caption_classes=classes, host=host, hosts=2))
    index, flat = load_index(out), load_index(whole)
    assert index.counts("train") == flat.counts("train")
    assert (index.caption_classes, index.caption_count) == (classes, "encoder")
    assert {stream.text_class for stream in index.streams} <= {1, 3, 100}
    assert len({stream.text_class for stream in index.streams}) > 1
    reader, found = RecordReader(index), []
    for stream in index.streams:
        records = reader.read(stream, np.arange(stream.records))
        below = max((most for most in classes if most < stream.text_class), default=-1)
        assert all(below < record.longest <= stream.text_class for record in records)
        assert {Bucket(record.height, record.width) for record in records} == {stream.bucket}
        found += [feature_records.encode(record) for record in records if stream.split == "train"]
    assert sorted(found) == sorted(map(feature_records.encode, flat.records("train")))
    # Longer than the longest class: any length.
    long = precompute(options(tiny_config, tmp_path / "long", caption_classes=(1,)))
    assert {stream.text_class for stream in load_index(long).streams} == {0, 1}


def test_what_they_were_made_with_must_fit(small_lens, stored, tmp_path):
    data = dataclasses.replace(small_lens.data, path=str(stored))
    text = dataclasses.replace(small_lens.text, date="2030-01-01")
    with pytest.raises(LensError, match=r"made with text.date '2026-05-23', the config says '2030-01-01'"):
        train(dataclasses.replace(small_lens, data=data, text=text, out=str(tmp_path / "run")))
    with pytest.raises(LensError, match="holds features already"):
        precompute(options(dataclasses.replace(small_lens, data=data), tmp_path / "twice"))
    with pytest.raises(LensError, match=r"codec.sample draws other latents for every epoch"):
        options(dataclasses.replace(small_lens, codec=dataclasses.replace(small_lens.codec, sample=True)), tmp_path)


def test_nothing_else_is_written_over(small_lens, stored, tmp_path):
    """Shards have the names that the images' have: a mistyped --out must not cost a data set."""
    images = load_index(small_lens.data.path)
    with pytest.raises(LensError, match="is a data set of images; give another folder"):
        precompute(options(small_lens, images.directory))
    assert load_index(images.directory) == images
    # A data set of images that was not finished has no index, and no notes.
    (tmp_path / "unfinished" / "train-24x24").mkdir(parents=True)
    with pytest.raises(LensError, match=r"holds train-24x24, which is not ours"):
        precompute(options(small_lens, tmp_path / "unfinished"))
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(LensError, match=r"holds thesis.tex, which is not ours"):
        precompute(options(small_lens, tmp_path))


def test_sizes_are_those_of_the_accounting(stored):
    """Bytes: 4 a number here; a record holds little besides."""
    index = load_index(stored)
    record = next(index.records("train"))
    numbers = record.latents.size + sum(x.size for texts in record.captions.values() for x in texts)
    assert record.latents.dtype == np.float32
    assert 0 <= len(feature_records.encode(record)) - 4 * numbers < 400
    assert index.features["layers"] == 2
    assert index.features["weights"].keys() == {"autoencoder", "text_encoder"}


def test_processes_of_a_cluster_end_alone(tiny_config, tmp_path, capsys, monkeypatch):
    """The second is done before the first has begun; had they met, it would wait, and JAX end both after 5 minutes."""
    out = tmp_path / "out"
    config = tmp_path / "mine.py"
    config.write_text("from lens_jax.pretraining.config import *\nconfig = TrainConfig()\n")
    flags = [
        "--data.path",
        tiny_config.data.path,
        "--out",
        str(out),
        "--codec.patch",
        "4",
        "--codec.components",
        "48",
        "--batch-size",
        "16",
    ]
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    for index, said in (("1", "this process's part is done"), ("0", "records, ")):
        monkeypatch.setenv("JAX_PROCESS_ID", index)
        with pytest.raises(SystemExit) as stop:
            cli.main(["precompute", str(config), *flags])
        assert stop.value.code == 0
        assert said in capsys.readouterr().out
        assert not jax.distributed.is_initialized()
        assert (out / NAME).is_file() == (index == "0")


def test_from_the_command_line(tiny_config, tmp_path, capsys, monkeypatch):
    config = tmp_path / "mine.py"
    config.write_text("from lens_jax.pretraining.config import *\nconfig = TrainConfig()\n")
    flags = [
        "--data.path",
        tiny_config.data.path,
        "--out",
        str(tmp_path / "out"),
        "--codec.patch",
        "4",
        "--codec.components",
        "48",
    ]
    with pytest.raises(SystemExit) as stop:
        cli.main(["precompute", str(config), *flags, "--batch-size", "16"])
    assert stop.value.code == 0
    assert json.loads((tmp_path / "out" / NAME).read_text())["source"] == "features"
    with pytest.raises(SystemExit) as stop:
        cli.main(["precompute", str(config), *flags, "--host", "2", "--hosts", "2"])
    assert stop.value.code == 2
    assert "hosts count from 0" in capsys.readouterr().err
    assert jax.process_count() == 1
