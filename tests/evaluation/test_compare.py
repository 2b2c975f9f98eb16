"""Reports side by side: figures worked by hand, reports of other prompts, and files that are no reports."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from lens_jax.errors import LensError
from lens_jax.evaluation import compare
from lens_jax.evaluation.config import EvaluateConfig


def write(folder, right, diversity, steps=20, guidance=5.0, captions=None):
    folder.mkdir()
    images = [
        # The second opinion says nothing of the first image.
        {"task": "two", "language": "en", "caption": caption, "right": value, "second": value if i else None}
        for i, (caption, value) in enumerate(zip(captions or [f"scene {i}" for i in range(len(right))], right))
    ]
    report = {
        "config": {"checkpoint": "runs/[bold]x"},
        "drawn_with": {"num_inference_steps": steps, "guidance_scale": guidance, "network_passes": 2 * steps},
        "diversity": {"brief": {"by_prompt": diversity}},
        "images": images,
    }
    (folder / "scenes.json").write_text(json.dumps(report))
    return str(folder)


def test_a_table_of_three(tmp_path):
    teacher = write(tmp_path / "teacher", [True, True, False, True], {"fox": 0.2, "cat": 0.4})
    student = write(tmp_path / "student", [True, False, False, True], {"cat": 0.3, "fox": 0.2}, 4, 1.0)
    same = write(tmp_path / "same", [True, True, False, True], {"fox": 0.2, "cat": 0.4})
    console = Console(width=200, record=True, file=io.StringIO())
    compare.run(EvaluateConfig(compare=(teacher, f"{student}/scenes.json", same)), console)
    text = console.export_text()
    first, second, third = (line for line in text.splitlines() if "runs/[bold]x" in line)
    assert all(figure in first for figure in ("20", "75.0 %", "66.7 %", "0.3000"))
    assert all(figure in second for figure in ("4", "50.0 %", "-25.0", "33.3 %", "0.83"))
    assert all(figure in third for figure in ("+0.0", "1.00 (1.00 to 1.00)"))


def test_intervals_are_of_pairs():
    """Agresti and Min's interval by hand: of 98 images 9 lost and 4 gained."""
    first = np.array([True] * 9 + [False] * 4 + [True] * 85)
    other = np.array([False] * 9 + [True] * 4 + [True] * 85)
    found = compare.difference(first, other)
    half = 1.959964 * math.sqrt(14 - 25 / 100) / 100
    assert found.value == pytest.approx(-5 / 98)
    assert (found.low, found.high) == (pytest.approx(-0.05 - half), pytest.approx(-0.05 + half))
    # All other prompts equally poorer: the ratio is exact, whatever the prompts' own spread.
    ratio = compare.ratio({"a": 1.0, "b": 3.0}, {"b": 2.4, "a": 0.8})
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.8, 0.8, 0.8))
    assert math.isnan(compare.ratio({"a": 0.0}, {"a": 1.0}).value)


def test_what_cannot_be_compared(tmp_path):
    right = [True, False]
    one = write(tmp_path / "one", right, {"fox": 0.2})
    for name, other, words in (
        ("more", {"right": [*right, True]}, "3 and 2 images; some images are missing"),
        ("prompts", {"captions": ["scene 0", "another"]}, "image 1 is of .*another"),
        ("diversity", {"diversity": {"cat": 0.2}}, "diversity of other brief prompts"),
    ):
        path = write(tmp_path / name, **{"right": right, "diversity": {"fox": 0.2}, **other})
        with pytest.raises(LensError, match=words):
            compare.run(EvaluateConfig(compare=(one, path)))
    with pytest.raises(LensError, match="at least two reports"):
        compare.run(EvaluateConfig(compare=(one,)))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"drawn_with": 3}', "[" * 100_000, "null", '{"images": [], "drawn_with": {}, "diversity": []}'],
)
def test_files_that_are_no_reports(tmp_path, text):
    path = tmp_path / "scenes.json"
    path.write_text(text)
    with pytest.raises(LensError, match=r"scenes.json: (not JSON|no report)"):
        compare.read(path)


@pytest.mark.parametrize(
    ("place", "value"), [("steps", 0), ("steps", "4"), ("guidance", float("nan")), ("guidance", 10**400)]
)
def test_reports_with_numbers_that_are_none(tmp_path, place, value):
    write(tmp_path / "a", [True], {"fox": 0.2}, **{place: value})
    with pytest.raises(LensError, match="no report of"):
        compare.read(tmp_path / "a")
    with pytest.raises(LensError, match="cannot be read: No such file"):
        compare.read(tmp_path / "b")
