"""Writing: what was kept is in the shards, whole, and training reads it; a second run changes nothing."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pa = pytest.importorskip("pyarrow", reason="needs the extra data")
pytest.importorskip("simplejpeg", reason="needs the extra data")
pytest.importorskip("cv2", reason="needs the extra data")

from lens_jax.data import mixture_file, writer  # noqa: E402
from lens_jax.data.buckets import assign, fit_image, parse_buckets  # noqa: E402
from lens_jax.data.config import DataConfig  # noqa: E402
from lens_jax.data.datasets import open_data  # noqa: E402
from lens_jax.data.engine import manifest, write  # noqa: E402
from lens_jax.data.engine.config import Caption, EngineConfig, Models, Source, Thresholds  # noqa: E402
from lens_jax.data.engine.groups import by_unit, find_groups, shards_a_group  # noqa: E402
from lens_jax.data.engine.layout import Layout  # noqa: E402
from lens_jax.data.engine.measure import Measure  # noqa: E402
from lens_jax.data.engine.probe import Probe  # noqa: E402
from lens_jax.data.engine.readers import units  # noqa: E402
from lens_jax.data.engine.run_unit import Runner  # noqa: E402
from lens_jax.data.engine.select import Select  # noqa: E402
from lens_jax.data.engine.stage import StopRun, fingerprints  # noqa: E402
from lens_jax.data.engine.tables import CAPTION, KEEP, SCORE, image_id, read_table  # noqa: E402
from lens_jax.data.index import load_index  # noqa: E402
from lens_jax.data.pipeline import batches  # noqa: E402
from lens_jax.data.records import decode_image  # noqa: E402
from lens_jax.errors import LensError, LensWarning  # noqa: E402

OFF = Thresholds(area=900, nsfw=None, aesthetic=None, watermark=None, laplacian=None, entropy=None, luminance=None)
BUCKETS = ("32x32", "16x16", "32x16", "16x32")
PHOTOS, WEB = 25, 14
SIZES = ((40, 40), (44, 22), (20, 50), (33, 36), (20, 20))  # height, width; the last is below `area`


@dataclasses.dataclass(frozen=True)
class Nulls:
    """Stands for the stages that need networks, or all images at once."""

    name: str
    schema: pa.Schema
    reads: tuple[str, ...] = ("probe",)
    version = 1

    def settings(self, config):
        return {}

    def open(self, config):
        return lambda given: pa.Table.from_pylist(
            [{"id": id} for id in given.tables["probe"]["id"].to_pylist()], self.schema
        )


class Captions(Nulls):
    """A model that refuses every fifth image, and says of the others what it is asked for."""

    def open(self, config):
        def run(given):
            rows = []
            for row in given.tables["probe"].to_pylist():
                for kind in config.caption.kinds:
                    said = (
                        {"status": "refused"}
                        if row["index"] % 5 == 3
                        else {"status": "ok", "text": f"{kind} {row['key']}"}
                    )
                    rows.append(
                        {"id": row["id"], "language": "en", "kind": kind, "model": "m", "prompt_version": "p1", **said}
                    )
            return pa.Table.from_pylist(rows, CAPTION)

        return run


def picture(number: int, kind: str = "JPEG") -> bytes:
    height, width = SIZES[number % len(SIZES)]
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Photographs with captions in a folder [a], two of them the same file, and a tar whose texts are alt texts."""
    root = tmp_path_factory.mktemp("raw")
    photos = root / "photos [a]"
    photos.mkdir()
    for number in range(PHOTOS):
        (photos / f"{number:03d}.jpg").write_bytes(picture(0 if number == 15 else number))
        (photos / f"{number:03d}.txt").write_text(f"photo {number}")
    (photos / "broken.jpg").write_bytes(picture(0)[:300])
    (photos / "broken.txt").write_text("broken")
    with tarfile.open(root / "web.tar", "w") as tar:
        for number in range(WEB):
            parts = {"png": picture(100 + number, "PNG"), "json": json.dumps({"url": f"http://x/{number}"}).encode()}
            for ending, data in {**parts, "txt": b"alt text"}.items():
                info = tarfile.TarInfo(f"{number:03d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return root


def settings(raw: Path, tmp_path: Path, **changes) -> EngineConfig:
    values = {
        "sources": (
            Source("photos", "folder", str(raw / "photos [a]"), weight=2.0, caption="keep", licence="CC0"),
            Source("web", "webdataset", str(raw / "web.tar")),
        ),
        "work": str(tmp_path / "work"),
        "out": str(tmp_path / "out"),
        "thresholds": OFF,
        "models": Models(nsfw=""),
        "caption": Caption(kinds=("dense", "brief")),
        "buckets": BUCKETS,
        "encoding": "png",
        "validation": 0.3,
        "unit_rows": 7,
        "group_bytes": 6000,
    }
    return EngineConfig(**{**values, **changes})


def build(config: EngineConfig, verify: bool = False):
    """All stages, one after the other, in this process: (layout, units, groups, index by source)."""
    writing = write.Write(captioned=True, verify=verify)
    stages = [Probe(), Measure(), Nulls("score", SCORE), Nulls("keep", KEEP), Select(), Captions("caption", CAPTION)]
    layout = Layout(Path(config.work), fingerprints({s.name: s for s in [*stages, writing]}, config))
    found = [unit for source in config.sources for unit in units(source, config.unit_rows)]
    for stage in stages:
        runner = Runner(stage, config, layout)
        for unit in found:
            if stage.name != "caption" or config.source(unit.source).caption != "keep":
                runner(unit)
    groups = find_groups(config, layout, found)
    of = {source.name: [group for group in groups if group.unit.source == source.name] for source in config.sources}
    unfinished = [
        source for source in config.sources if not manifest.is_finished(config, source, of[source.name], layout)
    ]
    runner = Runner(dataclasses.replace(writing, members=by_unit(groups)), config, layout)
    for group in groups:
        if group.unit.source in {source.name for source in unfinished}:
            runner(group.unit)
    indexes = {source.name: manifest.finish(config, source, of[source.name], layout) for source in config.sources}
    manifest.write_mixture(config, indexes)
    return SimpleNamespace(layout=layout, units=found, groups=groups, indexes=indexes)


def files(folder) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def contents(folder) -> dict[str, bytes]:
    return {name: data for name, (data, _) in files(folder).items()}


def records(index) -> dict[str, tuple]:
    """(split, record) of every image, by its key."""
    found = [
        (record.meta["key"], (split, record)) for split in ("train", "validation") for record in index.records(split)
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.fixture(scope="module")
def built(raw, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("built")
    config = settings(raw, tmp_path)
    return config, build(config)


def test_what_is_kept_is_stored_at_its_bucket_with_all_that_is_known(raw, built):
    _, run = built
    assert len([group for group in run.groups if group.unit.source == "photos"]) >= 2
    buckets = parse_buckets(BUCKETS)
    photos, web = records(run.indexes["photos"]), records(run.indexes["web"])
    # Every fifth image is too small, and the tar's model refused some.
    assert set(photos) == {f"{number:03d}.jpg" for number in range(PHOTOS) if number % 5 != 4}
    assert set(web) == {f"web.tar/{number:03d}" for number in range(WEB) if number % 5 not in (3, 4)}
    for name, (_, record) in photos.items():
        with Image.open(raw / "photos [a]" / name) as image:
            bucket = assign(image.height, image.width, buckets, 1.0)
            expected = fit_image(image.convert("RGB"), bucket)
            assert (record.meta["original_height"], record.meta["original_width"]) == (image.height, image.width)
        assert (record.height, record.width) == expected.shape[:2] == (bucket.height, bucket.width)
        np.testing.assert_array_equal(decode_image(record), expected)
        assert record.captions == {"en": (f"photo {int(name[:3])}",)}
        assert (record.source, record.licence) == (name, "CC0")
        assert record.meta["id"] == image_id("photos", name).hex()
        assert "alt_text" not in record.meta
        assert 0 < record.meta["luminance"] < 1
        assert "nsfw" not in record.meta  # not run is not there
    for name, (_, record) in web.items():
        assert record.captions == {"en": (f"dense {name}",), "en-x-brief": (f"brief {name}",)}
        assert record.meta["alt_text"] == "alt text"
        assert record.meta["url"] == f"http://x/{int(name[-3:])}"
        assert (record.meta["caption_model"], record.meta["caption_prompt"]) == ("m", "p1")
    assert {split for split, _ in photos.values()} == {"train", "validation"}
    assert photos["000.jpg"][0] == photos["015.jpg"][0]  # the same file is on the same side
    index = run.indexes["photos"]
    assert dict(index.dropped) == {"truncated": 1, "too small": 5}
    assert {entry["file"] for entry in index.failed} == {"broken.jpg", *(f"{n:03d}.jpg" for n in range(4, PHOTOS, 5))}
    assert dict(run.indexes["web"].dropped)["no caption"] == len([n for n in range(WEB) if n % 5 == 3])
    steps = index.config["steps"]
    assert [row["dropped"] for row in steps[:2]] == [1, 5]
    assert steps[-1]["left"] == len(photos)
    # Captions are drawn from the dense ones; brief ones are there for whoever asks.
    assert (run.indexes["web"].languages, run.indexes["web"].holdout_languages) == (("en",), ("en-x-brief",))


def test_training_reads_the_mixture(built):
    config, run = built
    data = open_data(
        DataConfig(path=f"{config.out}/mixture.json", batch_size=4, threads=0, areas="all"), validation=True
    )
    assert data.config.weights == (2.0, 1.0)
    seen, of_web = set(), 0
    iterator = batches(data, count=40)
    for batch in iterator:
        assert batch["pixels"].shape[1:] == (*batch["bucket"], 3)
        seen.update(batch["captions"])
        of_web += sum(caption.startswith("dense") for caption in batch["captions"])
    captions = {record.captions["en"][0] for index in run.indexes.values() for record in index.records("train")}
    assert seen == captions
    feeds, _ = data.feeds("train")
    assert {feed.shape.bucket for feed in feeds} == set(parse_buckets(BUCKETS))
    # An image of the photographs is seen twice as often as one of the others, to the rounding of each feed.
    shares = {n: sum(f.weight for f, o in zip(*data.feeds("train")) if o.source == n) for n in (0, 1)}
    assert abs(of_web - 160 * shares[1] / (shares[0] + shares[1])) <= len(feeds)


def test_a_second_run_changes_nothing_and_another_one_is_refused(raw, built, tmp_path):
    config, _ = built
    before = files(config.out)
    build(config, verify=True)
    assert files(config.out) == before
    with pytest.raises(LensError, match=r"photos: holds another data set.*choose another `out`"):
        build(dataclasses.replace(config, encoding="jpeg", work=str(tmp_path / "work")))
    with pytest.raises(LensError, match="holds another data set"):
        build(dataclasses.replace(config, thresholds=dataclasses.replace(OFF, area=1500)))
    assert files(config.out) == before


def test_units_of_any_size_and_any_place_give_the_same(raw, built, tmp_path):
    """Decisions image by image; and where units are the same, the same bytes."""
    config, run = built
    large = dataclasses.replace(settings(raw, tmp_path), unit_rows=1000, group_bytes=1 << 30)
    other = build(large)
    assert len(other.units) < len(run.units)

    def decisions(run) -> list[dict]:
        rows = [row for unit in run.units for row in read_table(run.layout.table("select", unit.id)).to_pylist()]
        return sorted(rows, key=lambda row: row["id"])

    assert decisions(other) == decisions(run)
    for name in ("photos", "web"):
        assert records(other.indexes[name]) == records(run.indexes[name])
        assert len(other.indexes[name].streams) == len(run.indexes[name].streams)
    elsewhere = settings(raw, tmp_path / "elsewhere")
    build(elsewhere)
    mine, theirs = contents(config.out), contents(elsewhere.out)
    indexes = {name for name in mine if name.endswith("index.json")}  # they name their folders
    assert {name: data for name, data in mine.items() if name not in indexes} == {
        name: data for name, data in theirs.items() if name not in indexes
    }
    for name in ("photos", "web"):
        assert load_index(f"{config.out}/{name}").fingerprint == load_index(f"{elsewhere.out}/{name}").fingerprint


@pytest.mark.parametrize("moment", [0, 5])
def test_stopped_while_a_shard_is_written_it_goes_on_to_the_same_bytes(raw, built, tmp_path, monkeypatch, moment):
    reference, _ = built
    config = settings(raw, tmp_path)
    closes, original = [], writer.HashedShard.close

    def close(self):
        closes.append(self)
        if len(closes) == moment + 1:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(writer.HashedShard, "close", close)
    with pytest.raises(KeyboardInterrupt):
        build(config)
    monkeypatch.undo()
    assert not list(Path(config.out).rglob("index.json"))
    stray = Path(config.out) / "photos" / "train-32x32" / "000077.array_record"
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_bytes(b"of a build that was given up")
    (stray.parent / "000000.array_record.partial").write_bytes(b"of a process that was killed")
    run = build(config)
    assert {k: v for k, v in contents(config.out).items() if not k.endswith("index.json")} == {
        k: v for k, v in contents(reference.out).items() if not k.endswith("index.json")
    }
    assert all(index.check() for index in run.indexes.values())


def test_shards_of_a_group_have_numbers_of_their_own(raw, tmp_path, monkeypatch):
    """Shards that fill up early, and groups that have none in a stream."""
    monkeypatch.setattr(write, "SHARD_BYTES", 2000)
    monkeypatch.setattr("lens_jax.data.engine.groups.SHARD_BYTES", 400)
    config = settings(raw, tmp_path, caption_classes=(25, 26))
    assert shards_a_group(config) == 2
    run = build(config)
    index = run.indexes["photos"]
    numbers = {(s.name, number) for s in index.streams for number in np.flatnonzero(index.shard_records(s))}
    assert {number % 2 for _, number in numbers} == {0, 1}
    # "photo 12" is about 3 tokens and 22 behind it; what the model wrote is longer than any class.
    assert {stream.text_class for stream in index.streams} == {25}
    assert {stream.text_class for stream in run.indexes["web"].streams} == {0}
    assert len(records(index)) == 20
    assert index.check() == len(numbers)
    assert any(not count for stream in index.streams for count in index.shard_records(stream))


def test_what_does_not_decode_again_is_not_written(raw, tmp_path, monkeypatch):
    original = write.images.encode_image
    monkeypatch.setattr(write.images, "encode_image", lambda pixels, encoding: original(pixels, encoding)[:-40])
    with (
        pytest.warns(LensWarning, match="photos: no image is left of it: 20 cannot be stored"),
        pytest.raises(LensError, match="no image is left of any source"),
    ):
        build(settings(raw, tmp_path), verify=True)
    assert not list(Path(tmp_path / "out").rglob("*.array_record"))


def test_a_source_that_changed_and_a_disk_that_is_full_are_one_line(raw, tmp_path, monkeypatch):
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(4):
        (root / f"{number}.jpg").write_bytes(picture(number))
    config = settings(raw, tmp_path, sources=(Source("mine", "folder", str(root)),))

    original = find_groups

    def changed(*arguments):
        (root / "1.jpg").write_bytes(picture(7))
        return original(*arguments)

    monkeypatch.setitem(globals(), "find_groups", changed)
    with pytest.raises(LensError, match=r"^1.jpg: the file is not what it was when it was probed"):
        build(config)
    monkeypatch.undo()
    monkeypatch.setattr(
        write, "HashedShard", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(StopRun, match=r"mine: cannot be written: No space left on device$"):
        build(dataclasses.replace(config, work=str(tmp_path / "again")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "not a mixture"),
        ('{"format": "lens-jax mixture", "version": 2}', "version 2"),
        ('{"format": "lens-jax mixture", "version": 1, "sources": 3}', "at least one"),
        ('{"format": "lens-jax mixture", "version": 1, "sources": [{"path": 3, "weight": 1}]}', "needs a `path`"),
        ('{"format": "lens-jax mixture", "version": 1, "sources": [{"path": "a", "weight": NaN}]}', "weight of 'a'"),
        ('{"format": "lens-jax mixture", "version": 1, "sources": [{"path": "a", "weight": -1}]}', "weight of 'a'"),
        ('{"format": "lens-jax mixture", "version": 1, "sources": [{"path": "a", "weight": 0}]}', "above 0"),
        ('{"format": "lens-jax mixture", "version": 1, "sources": [{"path": "a", "weight": 1}]}', "no data set at"),
    ],
)
def test_a_mixture_that_is_none_is_one_line(tmp_path, text, words):
    (tmp_path / "mixture.json").write_text(text)
    with pytest.raises(LensError, match=words) as caught:
        open_data(DataConfig(path=str(tmp_path / "mixture.json")))
    assert "\n" not in str(caught.value)
    assert mixture_file.resolve(DataConfig(path="data/x")).path == "data/x"
