"""Units through stages: once, whatever becomes of workers, and whoever runs them."""

import dataclasses
import os
import random
import re
import signal
import sys
import tarfile
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lens_jax.data.engine import units as unit_lists
from lens_jax.data.engine.config import EngineConfig, Source
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.live import live
from lens_jax.data.engine.run_stage import read_log, retry_failed, run_stage
from lens_jax.data.engine.stage import fingerprints
from lens_jax.data.engine.status import stage_status
from lens_jax.data.engine.supervisor import Options, Progress
from lens_jax.data.engine.tables import read_table
from lens_jax.errors import LensError

sys.path.insert(0, str(Path(__file__).parent))  # workers find the module by this path too
from fake_stages import Bytes, Length

COUNT = 60
HERE = Options(workers=0)


@pytest.fixture
def config(tmp_path):
    """Sixty files in a folder whose name means something to a shell, in six units."""
    folder = tmp_path / "im[a]ges *? é"
    folder.mkdir()
    for i in range(COUNT):
        (folder / f"{i:03d} [x].jpg").write_bytes(b"\xff\xd8\xff" + b"image %d" % i)
    return EngineConfig(
        (Source("s", "folder", str(folder)),), work=str(tmp_path / "work"), out=str(tmp_path / "out"), unit_rows=10
    )


def change(config, number, data):
    path = Path(config.sources[0].path) / f"{number:03d} [x].jpg"
    path.write_bytes(data)
    return path.name


def layout_of(config, stage, work=None):
    return Layout(Path(work or config.work), fingerprints({"probe": stage, "measure": Length()}, config))


def run(config, stage, options, work=None):
    layout = layout_of(config, stage, work)
    return layout, run_stage(stage, config, layout, unit_lists.find_units(config), options, show=False)


def files(layout, stage="probe"):
    return {path.name: path.read_bytes() for path in layout.folder(stage).glob("*.parquet")}


def kill_some(layout, number, seed, stop):
    """SIGKILL whoever runs a unit, at random moments."""
    draw = random.Random(seed)
    killed = set()
    while len(killed) < number and not stop.is_set():
        time.sleep(draw.uniform(0.0, 0.1))
        notes = [path for path in layout.folder("probe").glob("attempts/*/*") if path not in killed]
        if notes:
            note = draw.choice(notes)
            words = note.read_text().split() if note.exists() else []
            if len(words) == 3:  # started and not yet said to have ended
                killed.add(note)
                try:
                    os.kill(int(words[1]), signal.SIGKILL)
                except ProcessLookupError:
                    killed.discard(note)
    return killed


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killing_workers_changes_no_byte(config, tmp_path, kills):
    calm, _ = run(config, Bytes(), HERE, tmp_path / "calm")
    layout = layout_of(config, Bytes())
    stop, killed = threading.Event(), []
    killer = threading.Thread(target=lambda: killed.extend(kill_some(layout, kills, 1, stop)))
    killer.start()
    try:
        _, progress = run(config, Bytes(seconds=0.02), Options(workers=2))
    finally:
        stop.set()
        killer.join()
    assert files(layout) == files(calm)
    assert progress.counts["s"] == {"ok": COUNT}
    assert progress.restarts >= min(len(killed), 1)
    assert len(killed) >= min(kills, 3), "the run was over before anything was killed"
    assert not list(layout.folder("probe").glob("attempts/*/*"))
    assert not [name for name in os.listdir(layout.folder("probe")) if ".partial" in name and "-" not in name]


def test_an_image_that_ends_its_worker_is_named(config):
    names = {
        change(config, 7, b"KILL"): "decoder crashed",
        change(config, 33, b"RAISE"): "decoder crashed",
        change(config, 44, b"MEMORY"): "out of memory",
    }
    change(config, 50, b"BAD")
    layout, progress = run(config, Bytes(), Options(workers=2))
    assert progress.counts["s"] == {"ok": 56, "decoder crashed": 2, "out of memory": 1, "corrupt data": 1}
    assert not progress.failed
    rows = [row for path in sorted(layout.folder("probe").glob("*.parquet")) for row in read_table(path).to_pylist()]
    assert len(rows) == COUNT
    assert len({row["id"] for row in rows}) == COUNT
    problems = {row["key"]: row["problem"] for row in rows if row["problem"] not in (None, "corrupt data")}
    assert problems == names
    # Mended, they are tried again and no other is.
    units = unit_lists.read_units(config.work)
    before = files(layout)
    assert retry_failed(layout, ["probe"], units) == 3
    assert len(files(layout)) == 3
    assert all(before[name] == data for name, data in files(layout).items())


@pytest.mark.slow
def test_an_image_that_hangs_is_named(config):
    config = dataclasses.replace(config, stall_seconds=20, item_seconds=10)
    name = change(config, 23, b"HANG")
    layout, progress = run(config, Bytes(), Options(workers=2))
    assert progress.counts["s"] == {"ok": COUNT - 1, "timed out": 1}
    rows = [row for path in layout.folder("probe").glob("*.parquet") for row in read_table(path).to_pylist()]
    assert [row["key"] for row in rows if row["problem"]] == [name]


def test_a_share_of_the_units_each_gives_the_same(config, tmp_path):
    alone, _ = run(config, Bytes(), HERE, tmp_path / "alone")
    done = []
    for host in range(3):
        layout, progress = run(config, Bytes(), Options(workers=0, host=host, hosts=3))
        done.append(progress.units)
    assert done == [2, 2, 2]
    assert files(layout) == files(alone)


def test_a_finished_stage_reads_no_image(config, tmp_path):
    seen = tmp_path / "seen"
    stage = Bytes(reads_seen=str(seen))
    layout, _ = run(config, stage, HERE)
    assert seen.stat().st_size == COUNT
    _, progress = run(config, stage, Options(workers=2))
    assert seen.stat().st_size == COUNT
    assert progress.counts["s"] == {"ok": COUNT}
    # One table gone is one unit done again.
    next(layout.folder("probe").glob("*.parquet")).unlink()
    run(config, stage, HERE)
    assert seen.stat().st_size == COUNT + 10
    # Another setting has results of its own, and the old ones stay.
    other, _ = run(dataclasses.replace(config, strict_jpeg=False), stage, HERE)
    assert seen.stat().st_size == 2 * COUNT + 10
    assert len(files(layout)) == len(files(other)) == 6


def test_a_log_that_was_cut_off_is_read(config):
    layout, _ = run(config, Bytes(), HERE)
    (log,) = layout.logs("probe").glob("*.jsonl")
    text = log.read_text()
    log.write_text(text[: len(text) - 20])
    assert len(read_log(layout, "probe")) == 5
    _, progress = run(config, Bytes(), HERE)  # the sixth by its table
    assert progress.counts["s"] == {"ok": COUNT}
    assert stage_status(layout, "probe", unit_lists.read_units(config.work)).done == 6


def test_losing_most_images_stops_the_run(config):
    for i in range(40):
        change(config, i, b"BAD")
    with pytest.raises(
        LensError, match=r"source s: stage probe lost 40 of 60 images \(40 corrupt data\).*accept-losses"
    ):
        run(config, Bytes(), HERE)
    _, progress = run(config, Bytes(), Options(workers=0, accept_losses=True))
    assert progress.counts["s"] == {"ok": 20, "corrupt data": 40}
    with pytest.raises(LensError, match="--strict"):
        run(config, Bytes(), Options(workers=0, accept_losses=True, strict=True))


def test_a_source_that_changes_is_noticed(config):
    layout, _ = run(config, Bytes(), HERE)
    units = unit_lists.read_units(config.work)
    change(config, 12, b"another")
    assert unit_lists.find_units(config) == units
    assert not files(layout)  # of a folder that changed nothing is certain
    run(config, Bytes(), HERE)
    # Behind the engine's back, between two stages.
    folder = Path(config.sources[0].path)
    (folder / "000 [x].jpg").rename(folder / "zzz.jpg")
    with pytest.raises(LensError, match="is not what it was when it was probed"):
        run_stage(Length(), config, layout, units, Options(workers=1), show=False)


def test_a_table_changes_with_the_images_beside_it(tmp_path):
    root = tmp_path / "pairs"
    (root / "b").mkdir(parents=True)
    for name in "ab":
        pq.write_table(pa.table({"key": ["0"], "text": ["x"]}), root / f"{name}.parquet")
    (root / "b" / "0.jpg").write_bytes(b"\xff\xd8\xffimage")
    with tarfile.open(root / "a.tar", "w") as tar:
        tar.add(root / "b" / "0.jpg", "0.jpg")
    config = EngineConfig((Source("s", "table", str(root)),), work=str(tmp_path / "work"), out=str(tmp_path / "out"))
    layout, _ = run(config, Bytes(), HERE)
    units = unit_lists.read_units(config.work)
    assert set(files(layout)) == {f"{unit.id}.parquet" for unit in units}
    (root / "b" / "0.jpg").write_bytes(b"\xff\xd8\xffanother")
    unit_lists.find_units(config)
    assert set(files(layout)) == {f"{units[0].id}.parquet"}
    with tarfile.open(root / "a.tar", "a") as tar:
        tar.add(root / "b" / "0.jpg", "1.jpg")
    unit_lists.find_units(config)
    assert not files(layout)


def test_brackets_are_not_taken_for_colours(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    progress = Progress("probe", 2, working=[("a [/b] [red]", 1, 9.0, True)])
    progress.counts["s [/b]"].update({"ok": 1, "bomb": 1})
    with live(progress, show=True) as refresh:
        refresh(progress)
    said = " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err).split())
    assert "s [/b]: 1 bomb, a [/b] [red] slow: 9 s" in said


def test_units_that_failed_are_tried_again_only_when_asked(config):
    layout, _ = run(config, Bytes(), HERE)
    units = unit_lists.read_units(config.work)
    layout.table("probe", units[2].id).unlink()
    with pytest.raises(
        LensError, match=r"1 of 6 units failed.*reads stage probe, which has not been run.*--retry-failed"
    ):
        run_stage(Length(), config, layout, units, HERE, show=False)
    run(config, Bytes(), HERE)
    with pytest.raises(LensError, match="1 of 6 units failed"):
        run_stage(Length(), config, layout, units, HERE, show=False)
    assert retry_failed(layout, ["probe", "measure"], units) == 1
    progress = run_stage(Length(), config, layout, units, HERE, show=False)
    assert progress.counts["s"] == {"ok": COUNT}


def test_a_stage_that_cannot_be_opened_stops_the_run(config):
    with pytest.raises(LensError, match="no such weights"):
        run(config, Bytes(broken=True), Options(workers=2))
