"""Batches read from data sets: complete, reproducible, and independent of history and of the hosts that read them."""

import dataclasses
import json
import threading
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from lens_jax.data.buckets import LENS_PRETRAINING, Bucket, parse_buckets
from lens_jax.data.config import DataConfig
from lens_jax.data.datasets import open_data, repetition, serves
from lens_jax.data.mixture import START, Position, Shape, batch_shares
from lens_jax.data.permutation import permute
from lens_jax.data.pipeline import BatchSource, batches, validation_batches
from lens_jax.data.prepare import FolderConfig, prepare_folder
from lens_jax.data.prepare_scenes import OpenMojiConfig, prepare_openmoji
from lens_jax.data.reader import RecordReader
from lens_jax.data.records import decode_image
from lens_jax.errors import LensError

EVEN, ODD = (lambda size: np.arange(0, size, 2)), (lambda size: np.arange(1, size, 2))


SMALL = {"concepts": 8, "size": 24, "tile": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config = OpenMojiConfig(
        out=str(tmp_path_factory.mktemp("data") / "openmoji"),
        concepts=8,
        size=24,
        tile=4,
        scenes=60,
        copies=1,
        validation=11,
    )
    return str(prepare_openmoji(config, progress=False))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Forty images of one colour each, stored at 64x64 or 32x32: two areas."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "images").mkdir()
    for number in range(40):
        side = 64 if number < 30 else 32
        Image.new("RGB", (side, side), (6 * number, 0, 0)).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(str(number))
    config = FolderConfig(
        path=str(folder / "images"), out=str(folder / "data"), buckets=("64x64", "32x32"), min_side=8, validation=0.3,
        encoding="png",
    )  # fmt: skip
    return str(prepare_folder(config, progress=False))


def equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


def read(config: DataConfig, count: int, position: Position = START, **options) -> tuple[list[dict], Position]:
    reader = batches(open_data(config), position, count, **options)
    found = list(reader)
    return found, Position.from_json(json.loads(json.dumps(reader.position.to_json())), "here")


def images_of(found: list[dict]) -> list[bytes]:
    return [image.tobytes() for batch in found for image in batch["pixels"]]


def test_permutations_are_permutations_and_stay_what_they_are():
    for size in (1, 2, 3, 8, 9, 1000, 4097):
        np.testing.assert_array_equal(np.sort(permute(np.arange(size), size, 5, 6)), np.arange(size))
    # Literal numbers: a change here would break the resumption of every run.
    assert permute(np.arange(10), 10, 0, 1, 2).tolist() == [2, 6, 4, 0, 9, 8, 1, 7, 5, 3]
    huge = permute(np.arange(1000), 10**12, 3)
    assert len(np.unique(huge)) == 1000
    assert abs(huge.mean() / 10**12 - 0.5) < 0.05  # five standard errors


@pytest.mark.parametrize("threads", [0, 2])
def test_resuming_equals_no_interruption(data, threads):
    config = DataConfig(path=data, batch_size=4, threads=threads)
    whole, _ = read(config, 12)
    assert [batch["step"] for batch in whole] == list(range(12))
    reader = batches(open_data(config))  # without an end, so it reads ahead
    first = [next(reader) for _ in range(5)]
    position = Position.from_json(json.loads(json.dumps(reader.position.to_json())), "here")
    reader.close()
    rest, _ = read(config, 7, position)
    for expected, one in zip(whole, first + rest, strict=True):
        equal(expected, one)


def test_another_batch_size_goes_on_exactly(data):
    """The right value of a fault: the size changes twice, and every image comes once an epoch all the same."""
    found, position = [], START
    for size, count in ((4, 9), (2, 11), (8, 20)):
        more, position = read(DataConfig(path=data, batch_size=size), count, position)
        found += more
    opened = open_data(DataConfig(path=data))
    for feed, origin in zip(*opened.feeds("train")):
        bucket = feed.shape.bucket.height, feed.shape.bucket.width
        seen = Counter(images_of([batch for batch in found if batch["bucket"] == bucket]))
        stored = RecordReader(opened.indexes[0]).read(origin.stream, np.arange(feed.records))
        epochs, rest = divmod(seen.total(), feed.records)
        assert epochs >= 2
        for image, copies in Counter(decode_image(record).tobytes() for record in stored).items():
            assert copies * epochs <= seen.pop(image) <= copies * (epochs + (rest > 0))
        assert not seen


def test_hosts_read_the_rows_that_are_theirs(data):
    opened = open_data(DataConfig(path=data, batch_size=6, seed=4))
    whole, *halves = (BatchSource(opened, "train", rows=rows) for rows in (None, EVEN, ODD))
    for number in (0, 5, 1000):
        batch, parts = whole[number], [half[number] for half in halves]
        for host, part in enumerate(parts):
            np.testing.assert_array_equal(batch["pixels"][host::2], part["pixels"])
            assert batch["captions"][host::2] == part["captions"]
        assert {batch["bucket"], *(part["bucket"] for part in parts)} == {batch["pixels"].shape[1:3]}


def test_captions_depend_on_the_image_s_place_and_not_on_the_batch(data):
    config = DataConfig(path=data, batch_size=12)
    large, _ = read(config, 8)
    small, _ = read(dataclasses.replace(config, batch_size=4), 24)
    pairs = lambda found: Counter((i.tobytes(), c) for b in found for i, c in zip(b["pixels"], b["captions"]))
    # The two take turns otherwise, but agree on the beginning of every bucket's stream.
    assert (pairs(large) & pairs(small)).total() >= 0.7 * pairs(large).total()


def test_transform_and_languages(data):
    config = DataConfig(path=data, batch_size=4, languages=("de",), threads=1)
    reader = batches(open_data(config), transform=lambda batch: {"n": len(batch["captions"]), **batch})
    assert next(reader)["n"] == 4
    reader.close()
    for languages, words in ((("it",), "'?it'?"), (("xx",), "xx")):  # held out; unknown
        with pytest.raises(LensError, match=words):
            open_data(DataConfig(path=data, languages=languages))


def test_validation_sees_every_image_once_and_any_beginning_is_a_fair_sample(data):
    opened = open_data(DataConfig(path=data, batch_size=2), validation=True)
    runs = [list(validation_batches(opened)) for _ in range(2)]
    assert sum(batch["weight"].sum() for batch in runs[0]) == 11
    for one, other in zip(*runs, strict=True):
        equal(one, other)
    seen = [image.tobytes() for b in runs[0] for image, weight in zip(b["pixels"], b["weight"]) if weight]
    assert len(set(seen)) == 11
    # The right value of a fault: three batches are of all three buckets, not of the first.
    assert len({batch["bucket"] for batch in validation_batches(opened, count=3)}) == 3
    host = list(validation_batches(opened, rows=ODD))
    np.testing.assert_array_equal(host[0]["pixels"], runs[0][0]["pixels"][1::2])
    np.testing.assert_array_equal(host[-1]["weight"], runs[0][-1]["weight"][1::2])


def test_an_image_serves_every_area_that_it_covers(photographs):
    """Areas as often as the config says, from the same images, each once an epoch in every area."""
    config = DataConfig(path=photographs, areas="all", area_weights=(1, 1), batch_sizes=(4, 2))
    opened = open_data(config)
    feeds, _ = opened.feeds("train")
    large, small = (sum(f.records for f in feeds if f.shape.bucket == b) for b in (Bucket(64, 64), Bucket(32, 32)))
    stored = {stream.bucket: stream.records for stream in opened.indexes[0].streams if stream.split == "train"}
    assert (large, small) == (stored[Bucket(64, 64)], stored[Bucket(64, 64)] + stored[Bucket(32, 32)])
    assert batch_shares(feeds, opened.sizes(feeds)) == pytest.approx(
        {Shape(Bucket(32, 32)): 0.5, Shape(Bucket(64, 64)): 0.5}
    )
    found, position = read(config, 40)
    for bucket, total in (((64, 64), large), ((32, 32), small)):
        mine = [batch for batch in found if batch["bucket"] == bucket]
        assert abs(len(mine) - 20) <= 1
        # One colour an image, which is its caption: resized, it is the same image still.
        colours = [int(image[0, 0, 0]) for batch in mine for image in batch["pixels"]]
        captions = [int(caption) for batch in mine for caption in batch["captions"]]
        assert [6 * caption for caption in captions] == colours
        assert max(Counter(captions).values()) - min(Counter(captions).values()) <= 1
        assert len(set(captions)) == min(total, len(captions))
    assert set(position.taken) == {feed.name for feed in feeds}
    covered = list(validation_batches(open_data(config, validation=True)))
    assert {batch["bucket"] for batch in covered} == {(64, 64), (32, 32)}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_size": 2}, ""),
        ({"batch_size": 16}, "few images, which are repeated often: 32x32 has {small}, a batch 16"),
        ({"batch_size": 2, "area_weights": (99, 1)}, "often: 32x32 has {small}, a batch 2, each shown"),
    ],
)  # fmt: skip
def test_images_that_are_repeated_are_said(photographs, fields, words):
    opened = open_data(DataConfig(path=photographs, **fields))
    _, small = opened.indexes[0].counts("train")
    line = repetition(opened)
    assert words.format(small=small) in line
    assert bool(line) == bool(words)


def test_areas_of_the_report_from_its_largest():
    """Of the 27 sizes every one of 1024² serves itself and both smaller areas, with little cut off."""
    for stored in parse_buckets(("lens-1024",)):
        served = [bucket for bucket in LENS_PRETRAINING if serves(stored, bucket)]
        assert len(served) == 3
        for bucket in served:
            scale = max(bucket.height / stored.height, bucket.width / stored.width)
            assert scale <= 1
            kept = bucket.height * bucket.width / (stored.height * stored.width * scale**2)
            assert kept >= 0.975


def test_closing_waits_for_what_is_being_read(data):
    """Or the threads of a run that has ended would work beside the next one in the process."""
    begun, go_on, ended = threading.Event(), threading.Event(), []

    def transform(batch):
        if batch["step"]:
            begun.set()
            assert go_on.wait(30)
        ended.append(batch["step"])
        return batch

    reader = batches(open_data(DataConfig(path=data, batch_size=4, threads=2)), transform=transform)
    assert next(reader)["step"] == 0
    assert begun.wait(30)
    threading.Timer(0.3, go_on.set).start()
    reader.close()
    assert go_on.is_set()
    count = len(ended)
    assert count > 1
    time.sleep(0.1)
    assert len(ended) == count  # what had not been begun never is
    reader.close()


def test_sources_are_mixed_by_weight_within_a_batch(data, tmp_path):
    other = str(
        prepare_openmoji(
            OpenMojiConfig(out=str(tmp_path / "other"), **SMALL, scenes=30, copies=0, seed=1, languages=("en", "ja"),
                           holdout_languages=("ja",), validation=4),
            progress=False,
        )
    )  # fmt: skip
    config = DataConfig(sources=(data, other), source_weights=(1, 4), batch_size=14, languages=("en", "de"))
    opened = open_data(config, validation=True)
    feeds, origins = opened.feeds("train")
    expected = [sum(f.weight for f, o in zip(feeds, origins) if o.source == n) for n in (0, 1)]
    source = BatchSource(opened, "train")
    counts = Counter()
    for number in range(60):
        draw = source._plan.draw(number)
        counts.update({origins[part.feed].source: part.count for part in draw.parts})
        assert len(draw.parts) == 2  # every batch is of both
    assert counts[1] / counts.total() == pytest.approx(expected[1] / sum(expected), abs=0.01)
    assert expected == [84, 120]
    batch = source[0]
    assert len(batch["captions"]) == len(batch["pixels"]) == 14
    # Weight 0 leaves a source out, and the checkpoint still knows it.
    without = dataclasses.replace(config, source_weights=(1, 0))
    _, position = read(without, 2)
    assert set(position.data.values()) == {data, other}
    assert all(name.startswith(open_data(config).indexes[0].fingerprint) for name in position.taken)


def test_what_is_wrong_is_said_before_the_first_step(data, photographs, tmp_path):
    none = prepare_openmoji(
        OpenMojiConfig(out=str(tmp_path / "none"), **SMALL, scenes=30, copies=0, validation=0),
        progress=False,
    )
    cases = [
        ({"path": str(tmp_path / "absent")}, "absent.*lens-jax prepare"),
        ({"path": data, "languages": ("de", "xx")}, "data.languages xx: the train split of .* has "),
        ({"sources": (data, str(none)), "languages": ("it", "de")}, "data.languages it: the train split of "),
        ({"path": data, "buckets": ("16x16",)}, "data.buckets 16x16: .* prepare it with --buckets 16x16, or set data"),
        ({"path": photographs, "buckets": ("48x48",), "areas": "all"}, "data.buckets 48x48"),
        ({"path": photographs, "buckets": ("32x32",)}, "data.buckets 32x32"),
        ({"path": photographs, "batch_sizes": (1, 2, 3)}, r"data.batch_sizes \(1, 2, 3\): the buckets have 2 areas"),
        ({"path": photographs, "area_weights": (1,)}, r"data.area_weights \(1,\): the buckets have 2 areas"),
        ({"sources": (data, data)}, "are the same data set"),
        ({"path": str(none)}, r"none: no records in the validation split; .* set validation\.every 0"),
    ]
    for fields, message in cases:
        with pytest.raises(LensError, match=message) as error:
            open_data(DataConfig(**fields), validation=True)
        assert "\n" not in str(error.value)
    open_data(DataConfig(path=str(none)))
    for fields, message in [
        ({"batch_size": 0}, "data.batch_size is 0"), ({"area_weights": (0, 0)}, "data.area_weights"),
        ({"sources": ("a",), "source_weights": (1, 2)}, "there are 1 sources"),
    ]:  # fmt: skip
        with pytest.raises(LensError, match=message):
            DataConfig(**fields)
