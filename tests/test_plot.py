"""Curves: what is read from a damaged log is exact, and the image is there in the size it should have."""

import json
import math
import sys

import numpy as np
import pytest
from PIL import Image

from lens_jax import cli, plot
from lens_jax.data.buckets import LENS_PRETRAINING
from lens_jax.errors import LensError


def record(step: int, kind: str = "train", **values) -> str:
    return json.dumps({"step": step, "kind": kind, "time": 1.0, **values})


def full_record(step: int, loss: float) -> str:
    values = dict.fromkeys(
        ("gradient_norm", "update_norm", "parameter_norm", "learning_rate", "images_per_second", "data_wait_share",
         "tflops_per_second_per_device", "padding_share", "process_memory_gb", "mfu"), 0.5,
    )  # fmt: skip
    by_noise, by_bucket = [loss, None, loss / 2], {"64x32": loss, "32x64": 2 * loss}
    return record(step, loss=loss, loss_by_noise_level=by_noise, loss_by_bucket=by_bucket, **values)


def write_log(folder, lines):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def damaged(tmp_path):
    """Steps 20 and 30 were taken twice, one record has no loss, keys and kinds are unknown, the last line is cut."""
    lines = [full_record(10, 4.0), full_record(20, 3.0), full_record(30, 9.0), record(20, "validation", loss=9.0)]
    lines += [full_record(20, 2.0), record(20, "validation", loss=2.5), full_record(30, 1.0), "not JSON", "[1]", "{}"]
    lines += [record(40, loss=None, unheard_of={"a": [1]}), record(40, "comet", tail=1), full_record(50, 0.5)[:-9]]
    return write_log(tmp_path / "a" / "run", lines)


def test_reads_what_is_whole_and_the_last_of_each_step(damaged):
    log = plot.read_log(damaged / "metrics.jsonl")
    for key, expected in {
        ("loss",): [4, 2, 1, math.nan],
        ("loss_by_noise_level", 2): [2, 1, 0.5, math.nan],
        ("loss_by_noise_level", 1): [math.nan] * 4,
        ("loss_by_bucket", "32x64"): [8, 4, 2, math.nan],
        ("mfu",): [0.5, 0.5, 0.5, math.nan],
    }.items():
        steps, values = plot.series(log["train"], *key)
        np.testing.assert_array_equal(steps, [10, 20, 30, 40])
        np.testing.assert_array_equal(values, expected)
    assert [(r["step"], r["loss"]) for r in log["validation"]] == [(20, 2.5)]


def test_smoothing():
    nan = math.nan
    np.testing.assert_allclose(plot.smoothed(np.array([9, 3, 0, nan, 6, 1]), 3), [9, 4, 1.5, 3, 3.5, 1])
    np.testing.assert_allclose(plot.smoothed(np.array([nan, 2, 4, 9]), 1), [nan, 2, 4, 9])
    # Five wide, but the second place has one neighbour on its left and so takes one on its right.
    np.testing.assert_allclose(plot.smoothed(np.array([1.0, 2, 6, 3, 8]), 5), [1, 3, 4, 17 / 3, 8])


def test_many_sizes_are_drawn_as_their_areas():
    few = plot.bucket_groups(["64x32", "32x32"])
    assert few == {"32 x 32": ["32x32"], "64 x 32": ["64x32"]}
    groups = plot.bucket_groups([str(bucket) for bucket in LENS_PRETRAINING])
    assert [len(group) for group in groups.values()] == [9, 9, 9]
    for side, group in zip((512, 768, 1024), groups.values()):
        assert f"{side}x{side}" in group


def test_command_draws_one_run_and_several(damaged, tmp_path, capsys):
    other = write_log(tmp_path / "b" / "run", [full_record(step, 1 / step) for step in range(1, 40)])
    for argv, out in {
        (str(damaged),): damaged / "plot.png",
        (str(damaged), str(other / "metrics.jsonl"), "--out", str(tmp_path / "new" / "x.png"), "--smooth", "3"): (
            tmp_path / "new" / "x.png"
        ),
    }.items():
        with pytest.raises(SystemExit) as stop:
            cli.main(["plot", *argv])
        assert stop.value.code == 0
        assert str(out) in capsys.readouterr().out
        image = Image.open(out)
        assert (image.format, image.size) == ("PNG", (1600, 1400))
        # Something is drawn in each of the nine panels.
        pixels = np.asarray(image.convert("L")) < 200
        assert all(part.any() for row in np.array_split(pixels, 3) for part in np.array_split(row, 3, axis=1))
    assert plot.short_names([damaged / "metrics.jsonl", other / "metrics.jsonl"]) == ["a/run", "b/run"]


def test_errors(damaged, tmp_path, monkeypatch):
    empty = write_log(tmp_path / "empty", [record(1, "validation", loss=1.0)])
    for runs, message in {
        (): "at least one run",
        ("nowhere",): "nowhere: no metrics.jsonl there",
        (str(empty),): "no training records",
        (str(damaged), f"{damaged}/"): "given twice",
    }.items():
        with pytest.raises(LensError, match=message):
            plot.plot(plot.PlotConfig(runs))
    with pytest.raises(LensError, match="cannot be written"):
        plot.plot(plot.PlotConfig((str(damaged),), out=str(damaged / "metrics.jsonl" / "x.png")))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LensError, match=r'pip install "lens-jax\[plot\]"'):
        plot.plot(plot.PlotConfig((str(damaged),)))
