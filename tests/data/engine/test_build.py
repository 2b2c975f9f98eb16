"""A build from files to data sets, and what is done with it afterwards."""

import dataclasses
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lens_jax.data.buckets import Bucket
from lens_jax.data.engine import build as building
from lens_jax.data.engine import plan, readers, remove, removed, units, why
from lens_jax.data.engine.captions import contract
from lens_jax.data.engine.captions.config import Caption
from lens_jax.data.engine.captions.forecast import Forecast
from lens_jax.data.engine.config import EngineConfig, Models, Source, Thresholds
from lens_jax.data.engine.layout import load_layout
from lens_jax.data.engine.measure import Measure
from lens_jax.data.engine.probe import Probe
from lens_jax.data.engine.supervisor import Options
from lens_jax.data.engine.tables import image_id
from lens_jax.data.index import load_index
from lens_jax.data.index_writer import IndexWriter
from lens_jax.data.prepare_curated import CuratedConfig, prepare_curated
from lens_jax.errors import LensError
from lens_jax.llm.endpoint import Endpoint

HERE = Options(workers=0, accept_losses=True)
GOOD = ["a.jpg", "b [1].jpg", "<b>c</b>.jpg", "d d/é*.png", "e.jpg", "f.jpg", "g.jpg"]


def picture(seed, size=(48, 40)):
    """A photograph of sorts: sharp, neither dark nor bright."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(30, 220, (12, 12, 3)).astype(np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.NEAREST)


def data_of(image, kind="JPEG"):
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return file.getvalue()


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """A folder and a tar with what goes wrong among what does not."""
    root = tmp_path_factory.mktemp("collection")
    folder = root / "folder"
    (folder / "d d").mkdir(parents=True)
    for seed, name in enumerate(GOOD):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data_of(picture(seed), "PNG" if name.endswith("png") else "JPEG"))
        path.with_suffix(".txt").write_text(f"caption of {seed}")
    bad = {
        "copy.jpg": (folder / "a.jpg").read_bytes(),
        "white.png": data_of(Image.new("RGB", (48, 48), "white"), "PNG"),
        "dark.png": data_of(Image.fromarray(np.asarray(picture(90)) // 40), "PNG"),
        "tiny.png": data_of(picture(91, (9, 9)), "PNG"),
        "short.jpg": data_of(picture(92, (200, 200)))[:900],
        "no.png": b"this is a text",
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("a caption")
    with tarfile.open(root / "shard.tar", "w") as tar:
        for seed in range(20, 24):
            for ending, data in ((".jpg", data_of(picture(seed))), (".txt", f"caption of {seed}".encode())):
                entry = tarfile.TarInfo(f"{seed:05d}{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return root


@pytest.fixture
def config(collection, tmp_path):
    return EngineConfig(
        sources=(
            Source("folder", "folder", str(collection / "folder"), licence="CC0", caption="keep"),
            Source("tar", "webdataset", str(collection / "shard.tar"), weight=2.0, caption="keep"),
        ),
        work=str(tmp_path / "work"),
        out=str(tmp_path / "out"),
        thresholds=Thresholds(area=32 * 32),
        models=Models(nsfw=""),
        buckets=("32x32", "32x40"),
        validation=0.2,
        unit_rows=5,
    )


def build(config, **options):
    return building.build(config, HERE, show=False, **options)


def ids_in(config, source="folder"):
    index = load_index(Path(config.out) / source)
    index.check()
    return {r.meta["id"]: r for split in ("train", "validation") for r in index.records(split)}


def contents(*folders):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for folder in folders
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and "/log/" not in str(path)
    }


def test_a_collection_becomes_data_sets(config, monkeypatch):
    page = build(config).read_text()
    records = ids_in(config)
    assert len(records) == len(GOOD)
    assert {r.source for r in records.values()} == set(GOOD) or {r.source for r in records.values()} == {
        "copy.jpg", *GOOD[1:]
    }  # fmt: skip
    assert len(ids_in(config, "tar")) == 4
    seed = {name: i for i, name in enumerate(GOOD)}
    for name, record in records.items():
        assert name == image_id("folder", record.source).hex()
        assert record.licence == "CC0"
        if record.source in seed:
            assert record.captions == {"en": (f"caption of {seed[record.source]}",)}
    mixture = json.loads((Path(config.out) / "mixture.json").read_text())
    assert {(s["path"], s["weight"]) for s in mixture["sources"]} == {("folder", 1.0), ("tar", 2.0)}

    # All that went in has kept or a reason, and no more.
    index = load_index(Path(config.out) / "folder")
    assert sum(index.counts("train")) + sum(index.counts("validation")) + sum(index.dropped.values()) == 13
    steps = {row["name"]: row["dropped"] for row in index.config["steps"]}
    assert (steps["corrupt"], steps["area"], steps["duplicates"]) == (2, 1, 1)
    assert steps["entropy"] + steps["luminance"] + steps["clarity"] == 2

    # The page shows it, and a file's name is no part of it.
    assert page.count("data:image/jpeg;base64,") > 10
    assert "17 images of 2 sources, 11 kept" in page
    assert "Not run: unsafe content, aesthetic score, watermark, near duplicates" in page
    assert "<b>c</b>" not in page
    assert re.search(r"http(s)?://(?!www.w3.org)", page) is None

    # Again, and nothing is read or written.
    before = contents(config.work, config.out)
    monkeypatch.setattr(readers, "read", lambda *_: pytest.fail("an image was read"))
    build(config)
    assert contents(config.work, config.out) == before


def test_a_new_threshold_computes_no_score_again(config, monkeypatch):
    build(config)
    for stage in (Probe, Measure):
        monkeypatch.setattr(stage, "open", lambda *_: pytest.fail("a score was computed"))
    strict = dataclasses.replace(config, thresholds=dataclasses.replace(config.thresholds, area=48 * 40 + 1))
    with pytest.raises(LensError, match="holds a data set of other images or settings; pass --overwrite"):
        build(strict)
    without = dataclasses.replace(config.thresholds, laplacian=None, entropy=None, luminance=None)
    loose = dataclasses.replace(config, thresholds=without)
    build(loose, overwrite=True)
    assert len(ids_in(loose)) == len(GOOD) + 2  # the dark one and the white one
    # And back: what lies there is of the other settings, whatever the tables say.
    build(config, overwrite=True)
    assert len(ids_in(config)) == len(GOOD)


def test_workers_and_machines_write_the_same_bytes(config, tmp_path):
    build(config)
    other = dataclasses.replace(config, work=str(tmp_path / "work3"), out=str(tmp_path / "out3"))
    for stage in ("probe", "measure", "score"):
        for host in range(3):
            building.run_one(other, stage, dataclasses.replace(HERE, host=host, hosts=3), show=False)
    with pytest.raises(LensError, match="without --hosts"):
        building.run_one(other, "keep", dataclasses.replace(HERE, host=0, hosts=3), show=False)
    building.run_one(other, "keep", HERE, show=False)
    for stage in ("select", "write"):
        for host in range(3):
            building.run_one(other, stage, dataclasses.replace(HERE, host=host, hosts=3), show=False)
    for source in ("folder", "tar"):
        ours, theirs = (contents(Path(c.out) / source) for c in (config, other))
        index, another = (json.loads(files.pop("index.json")) for files in (ours, theirs))
        assert ours == theirs
        assert index["fingerprint"] == another["fingerprint"]


def test_what_is_taken_down_is_gone_and_stays_out(config, tmp_path):
    build(config)
    before = ids_in(config)
    name = next(n for n, r in before.items() if r.source == "e.jpg")
    untouched = contents(Path(config.out) / "tar")
    outcome = remove.remove(Path(config.out), frozenset({bytes.fromhex(name), bytes(16)}), show=False)
    assert (outcome.records, outcome.shards, outcome.unknown) == (1, 1, 1)
    after = ids_in(config)
    assert set(after) == set(before) - {name}
    assert all(after[n] == before[n] for n in after)
    assert load_index(Path(config.out) / "folder").dropped["taken down"] == 1
    assert contents(Path(config.out) / "tar") == untouched
    assert not (Path(config.out) / "report.html").exists()
    # Again it changes nothing.
    assert remove.remove(Path(config.out), frozenset({bytes.fromhex(name)}), show=False).records == 0
    build(config, overwrite=True)
    assert name not in ids_in(config)
    (story,) = why.find(load_layout(config.work), units.read_units(config.work), "e.jpg", show=False)
    assert story.rows["select"][0]["reason"] == "taken down"


def test_what_is_made_of_a_data_set_is_named_when_an_image_is_taken_down(config):
    build(config)
    out = Path(config.out)
    table = out / "kinds.csv"
    names = {record.source: name for of in ("folder", "tar") for name, record in ids_in(config, of).items()}
    table.write_text("file_name,kind\n" + "".join(f"{source},{'xy'[i % 2]}\n" for i, source in enumerate(names)))
    # Named so that they come before and after what they are of.
    chosen = CuratedConfig("", images=2, kinds=("x", "y"), table=str(table), fill=True, skip_missing=True)
    for name, of in (("curated", "folder"), ("zcurated", "folder"), ("other", "tar")):
        made = dataclasses.replace(chosen, path=str(out / of), out=str(out / name))
        prepare_curated(made, progress=False)
    features(out / "features", load_index(out / "folder").fingerprint)
    features(out / "features of another", "0" * 16)
    untouched = contents(out / "curated")
    # Nothing is outdated where nothing is removed.
    assert remove.remove(out, frozenset({bytes(16)}), show=False).outdated == ()
    outcome = remove.remove(out, frozenset({bytes.fromhex(names["e.jpg"])}), show=False)
    assert (outcome.records, outcome.unknown) == (1, 0)
    assert {path.name for path in outcome.outdated} == {"curated", "zcurated", "features"}
    assert contents(out / "curated") == untouched
    with pytest.raises(LensError, match="subset of another state"):
        load_index(out / "curated")
    assert "e.jpg" not in {r.source for r in load_index(out / "folder").records("train")}
    assert list(load_index(out / "other").records("train"))


def features(folder, of):
    """A data set of features that says it was made of another."""
    folder.mkdir()
    made = {"of": of, "dtype": "float32", "codec": {"kind": "linear"}, "text": {"kind": "sentence"}, "weights": {},
            "layers": 1, "text_width": 8, "max_tokens": 4, "fitted": {}}  # fmt: skip
    IndexWriter(folder).finish(
        (Bucket(16, 16),), source="features", config=made, licence="", languages=["en"], holdout_languages=[],
        captioned={"train": {}},
    )  # fmt: skip


def test_a_removal_that_was_cut_off_is_ended(config, monkeypatch):
    build(config)
    before = ids_in(config)
    names = frozenset(bytes.fromhex(name) for name in sorted(before)[:3])
    # It dies after its note, before its first rename.
    monkeypatch.setattr(remove, "finish", lambda folder: (folder / remove._NOTE).is_file() and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        remove.remove(Path(config.out), names, show=False)
    monkeypatch.undo()
    assert set(ids_in(config)) == set(before)
    remove.remove(Path(config.out), names, show=False)
    assert {bytes.fromhex(name) for name in set(before) - set(ids_in(config))} == names
    assert load_index(Path(config.out) / "folder").dropped["taken down"] == 3
    assert not list(Path(config.out).rglob("*.removing"))


def test_why_tells_of_an_image(config):
    build(config)
    layout, everything = load_layout(config.work), units.read_units(config.work)
    name = image_id("folder", "copy.jpg").hex()
    for wanted in (name, name[:9], "copy.jpg"):
        (story,) = why.find(layout, everything, wanted, show=False)
        text = "\n".join(why.lines(story, "somewhere"))
        assert name in text
        assert "format JPEG" in text
    both = [why.find(layout, everything, key, show=False)[0] for key in ("a.jpg", "copy.jpg")]
    dropped = [s.rows["select"][0]["reason"] for s in both]
    assert sorted(dropped, key=str) == [None, "duplicate"]
    (kept,) = (story for story in both if story.rows["select"][0]["kept"])
    written = kept.rows["write"][0]
    assert (written["bucket"], written["problem"]) == ("32x40", None)
    with pytest.raises(LensError, match=r"no image 'nowhere\.jpg' among the"):
        why.find(layout, everything, "nowhere.jpg", show=False)


def test_a_plan_is_of_a_sample_of_these_images(config):
    everything = [unit for source in config.sources for unit in readers.units(source, config.unit_rows)]
    sample = plan.take_sample(config, everything, 100)
    # All of them, as there are fewer: but for the copy, which is found only by looking at all together.
    assert (sample.images, sample.decoded, sample.kept) == (17, 15, 12)
    assert set(sample.cpu_seconds) == {"probe", "measure", "score", "select", "write"}
    assert min(sample.cpu_seconds["measure"], sample.cpu_seconds["write"], sample.stored_bytes) > 0
    lines = {line.stage: line for line in plan.cost(config, sample, 1000)}
    more = {line.stage: line for line in plan.cost(config, sample, 1e6)}
    assert lines["write"].images == 1000
    assert lines["measure"].images == pytest.approx(1000 * 17 / 12)
    for stage in ("probe", "measure", "write"):
        assert more[stage].core_hours == pytest.approx(1000 * lines[stage].core_hours)
    assert lines["write"].terabytes == pytest.approx(sample.stored_bytes * 1000 / 1e12)
    prices = plan.Prices(core=0.05)
    parts = plan.to_json(sample, list(lines.values()), prices)["parts"]
    assert parts[0]["cost"] == pytest.approx(0.05 * lines["probe"].core_hours)
    # Nothing is left of it.
    assert not Path(config.out).exists()
    assert not Path(config.work).exists()


def test_a_plan_prices_captions_by_source_and_no_descriptor_as_a_network(config, collection):
    endpoint = Endpoint(url="http://127.0.0.1:1/v1", model="m", usd_per_million=(2.0, 8.0))
    folder, tar = config.sources
    captioned = dataclasses.replace(
        config,
        sources=(dataclasses.replace(folder, caption="keep"), dataclasses.replace(tar, caption="brief")),
        caption=Caption(endpoint=endpoint, kinds=("dense", "brief")),
    )

    def planned(config):
        everything = [unit for source in config.sources for unit in readers.units(source, config.unit_rows)]
        sample = plan.take_sample(config, everything, 100)
        return sample, {line.stage: line for line in plan.cost(config, sample, 1000)}

    sample, lines = planned(captioned)
    # Of the four images of the tar alone, and of these brief ones alone.
    expected, caption = Forecast(), captioned.caption
    for _ in range(4):
        expected.add(caption, contract.tasks(caption, ("brief",), bytes(16)), 40, 48)
    assert sample.captions == expected
    assert lines["captions"].images == pytest.approx(1000 * 4 / 12)
    assert lines["captions"].usd == pytest.approx(expected.usd(caption) * 1000 / 12)
    # A descriptor is no work for a GPU; weights in a folder are.
    _, lines = planned(dataclasses.replace(config, models=Models(nsfw="", embedding="layout")))
    assert "networks on GPUs" not in lines
    assert "network" not in lines["embed"].basis
    named = dataclasses.replace(config, models=Models(nsfw="", embedding="clip"))
    (line,) = [line for line in plan.cost(named, sample, 1000) if line.stage == "networks on GPUs"]
    assert line.gpu_hours == pytest.approx(plan.network_flop()["embedding"] * line.images / (0.4 * 989e12) / 3600)


def test_a_sample_is_spread_as_the_images_are(config):
    """The folder has four units, the tar one, so that it is a fifth of what is planned."""
    everything = [unit for source in config.sources for unit in readers.units(source, config.unit_rows)]
    assert [unit.source for unit in everything] == ["folder"] * 3 + ["tar"]
    assert plan.take_sample(config, everything, 4).images == 4
    chosen = [(source.name, most) for source, _, most in plan._chosen(config, everything, 8)]
    assert chosen == [("folder", 2)] * 3 + [("tar", 2)]
    copies = [dataclasses.replace(everything[0], part=part) for part in range(9)]
    chosen = [(source.name, most) for source, _, most in plan._chosen(config, [*copies, everything[-1]], 100)]
    assert chosen == [("folder", 22)] * 4 + [("tar", 10)]


def test_lists_of_what_is_taken_down_are_checked(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("# why\n\n" + "AB" * 16 + "  # a comment\n")
    assert removed.read_ids(path) == {b"\xab" * 16}
    path.write_text("cat.jpg\n")
    with pytest.raises(LensError, match=r"ids.txt:1: 'cat.jpg' is no id"):
        removed.read_ids(path)


def test_folders_are_checked_before_the_work(config, collection):
    inside = dataclasses.replace(config, out=str(collection / "folder" / "out"))
    with pytest.raises(LensError, match="lies in what source folder reads"):
        build(inside)
    with pytest.raises(LensError, match="no stage 'sort'"):
        building.run_one(config, "sort", HERE, show=False)
