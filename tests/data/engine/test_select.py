"""The nine steps on stored scores: sides of thresholds, orders, missing scores, and the counts."""

import dataclasses
import itertools
import math

import numpy as np
import pyarrow as pa
import pytest

from lens_jax.data.engine import select, steps
from lens_jax.data.engine.config import EngineConfig, Models, Source, Thresholds
from lens_jax.data.engine.funnel import funnels
from lens_jax.data.engine.tables import DECISION, KEEP, MEASURE, PROBE, SCORE

SOURCE = Source("web", "folder", "web")
MODELS = Models(nsfw="open_nsfw", aesthetic="a", watermark="w", embedding="e")
CONFIG = EngineConfig((SOURCE,), models=MODELS, buckets=("lens-512",), max_upscale=2.0)
GOOD = {
    "width": 640, "height": 512, "problem": None, "nsfw": [0.9, 0.1, 0, 0], "aesthetic": 5.0, "watermark": 0.0,
    "laplacian": 500.0, "entropy": 7.0, "luminance": 0.5, "duplicate_of": None, "cosine": None,
}  # fmt: skip
SCHEMAS = {"probe": PROBE, "measure": MEASURE, "score": SCORE, "keep": KEEP}


def identity(number: int) -> bytes:
    return number.to_bytes(16, "big")


def tables(*changes) -> dict[str, pa.Table]:
    """Of an image each that is good but for these values."""
    rows = []
    for number, change in enumerate(changes):
        row = {"id": identity(number), "index": number, "key": str(number), "sha256": bytes([number]) * 32}
        rows.append(row | GOOD | change)
    return {name: pa.Table.from_pylist(rows, schema) for name, schema in SCHEMAS.items()}


def decide(config: EngineConfig, *changes) -> list[dict]:
    table = select.decide(config, config.sources[0], tables(*changes))
    assert table.schema == DECISION
    assert table.num_rows == len(changes)
    return table.to_pylist()


def after(value: float, up: bool) -> float:
    """The next float32."""
    return float(np.nextafter(np.float32(value), np.float32(math.inf if up else -math.inf)))


# (step, on the side that is dropped, on the side that is kept): a threshold itself belongs to one of them.
SIDES = {
    "area": (2, {"width": 383, "height": 385}, {"width": 384, "height": 384}),
    "a pixel less": (2, {"width": 384, "height": 383}, {"width": 147_456, "height": 1}),
    "nsfw": (3, {"nsfw": [0.25, 0.25, 0.25, 0.25]}, {"nsfw": [0.25, 0.2505, 0.25, 0.2495]}),
    "nsfw by its highest level": (3, {"nsfw": [0.5, 0, 0, 0.5]}, {"nsfw": [0.502, 0, 0, 0.498]}),
    "aesthetic": (4, {"aesthetic": after(3, False)}, {"aesthetic": 3.0}),
    "watermark": (5, {"watermark": 0.5}, {"watermark": after(0.5, False)}),
    "clarity": (6, {"laplacian": after(10, False)}, {"laplacian": 10.0}),
    "entropy": (7, {"entropy": after(1, False)}, {"entropy": 1.0}),
    "dark": (8, {"luminance": after(0.05, False)}, {"luminance": 0.05}),
    "bright": (8, {"luminance": after(0.98, True)}, {"luminance": 0.98}),
    "duplicate": (9, {"duplicate_of": identity(7), "cosine": 0.99}, {"cosine": 0.99}),
}


@pytest.mark.parametrize(("step", "fails", "passes"), SIDES.values(), ids=SIDES.keys())
def test_sides_of_thresholds(step, fails, passes):
    first, second = decide(dataclasses.replace(CONFIG, max_upscale=1000.0), fails, passes)
    assert (first["kept"], first["step"]) == (False, step)
    assert first["reason"]
    assert (second["kept"], second["step"], second["reason"]) == (True, None, None)


def test_the_value_stands_beside_the_decision():
    rows = decide(
        CONFIG,
        {"width": 100, "height": 50},
        {"nsfw": [0, 0, 0.25, 0.5]},
        {"luminance": 0.99},
        {"luminance": 0.01},
        {"problem": "truncated"},
    )
    assert [row["value"] for row in rows] == [5000, 0.75, pytest.approx(0.99), pytest.approx(0.01), None]
    assert [row["reason"] for row in rows] == ["too small", "unsafe", "too bright", "too dark", "truncated"]


BAD = {
    1: {"problem": "corrupt data", "laplacian": None, "entropy": None, "luminance": None},
    2: {"width": 100},
    3: {"nsfw": [0, 0, 0, 1]},
    4: {"aesthetic": 1.0},
    5: {"watermark": 1.0},
    6: {"laplacian": 1.0},
    7: {"entropy": 0.5},
    8: {"luminance": 0.0},
    9: {"duplicate_of": identity(7), "cosine": 0.99},
}


def test_orders_keep_the_same_and_count_at_another_step():
    """Every pair of faults: the first step of the order has it, and no order lets one through."""
    pairs = [*itertools.combinations(BAD, 2), ()]
    changes = [{name: value for step in pair for name, value in BAD[step].items()} for pair in pairs]
    for name, order in steps.ORDERS.items():
        assert sorted(order) == list(range(1, 10))
        rows = decide(dataclasses.replace(CONFIG, order=name), *changes)
        assert [row["step"] for row in rows] == [min(pair, key=order.index, default=None) for pair in pairs]
        assert [row["kept"] for row in rows] == [not pair for pair in pairs]


def test_survivors_are_what_duplicates_are_looked_for_among():
    """What passes all steps but the ninth, in any order of them."""
    given = tables(*BAD.values(), {}, {"width": 385, "height": 384})
    found = select.survivors(dataclasses.replace(CONFIG, max_upscale=1.0), SOURCE, given)
    assert found.tolist() == [False] * 8 + [True, True, False]  # the last has no bucket


def test_nothing_passes_unseen():
    """A score that a step needs and that is missing, or no number, drops the image; one that none needs does not."""
    missing = [{"nsfw": None}, {"aesthetic": None}, {"watermark": None}, {"aesthetic": math.nan},
               {"nsfw": [math.nan] * 4}, {"laplacian": math.nan}]  # fmt: skip
    rows = decide(CONFIG, *missing)
    assert [row["step"] for row in rows] == [3, 4, 5, 4, 3, 6]
    assert [row["reason"] for row in rows] == ["no score"] * 3 + ["score not a number"] * 2 + ["no score"]
    without = dataclasses.replace(CONFIG, models=Models(nsfw=""))
    assert [row["kept"] for row in decide(without, *missing)] == [True] * 5 + [False]


def test_thresholds_of_a_source_and_steps_left_out():
    nothing = Thresholds(1, None, None, None, None, None, None, None)
    own = dataclasses.replace(SOURCE, thresholds=nothing)
    config = dataclasses.replace(CONFIG, sources=(own,), max_upscale=100.0)
    assert [row["kept"] for row in decide(config, *BAD.values())] == [False] + [True] * 8
    dark = dataclasses.replace(SOURCE, thresholds=Thresholds(luminance=(0.0, 0.4)))
    rows = decide(dataclasses.replace(CONFIG, sources=(dark,)), {"luminance": 0.0}, {"luminance": 0.5})
    assert [row["reason"] for row in rows] == [None, "too bright"]


def test_there_is_one_threshold_of_cosine():
    """That of a source only leaves step 9 out, in decisions and on the report page."""
    run = dataclasses.replace(CONFIG, thresholds=Thresholds(cosine=0.9))
    of = lambda given: run.thresholds_of(dataclasses.replace(SOURCE, thresholds=given))
    assert of(None) == run.thresholds
    assert of(Thresholds(area=1, cosine=0.7)) == Thresholds(area=1, cosine=0.9)
    assert of(Thresholds(cosine=None)).cosine is None
    run = dataclasses.replace(CONFIG, thresholds=Thresholds(cosine=None))
    assert of(Thresholds(cosine=0.7)).cosine is None


def test_bucket_split_and_what_was_taken_down():
    given = tables({}, {"width": 400, "height": 400}, {"width": 1100, "height": 540}, {})
    config = dataclasses.replace(CONFIG, max_upscale=1.0)
    rows = select.decide(config, SOURCE, given, removed=frozenset([identity(3)])).to_pylist()
    assert [row["bucket"] for row in rows] == ["448x608", None, "352x704", None]
    assert [row["reason"] for row in rows] == [None, select.NO_BUCKET, None, select.REMOVED]
    assert [row["step"] for row in rows] == [None] * 4
    splits = [select.split_of(number.to_bytes(32, "big"), 0, 0.25) for number in range(2000)]
    assert splits.count("validation") == pytest.approx(500, abs=80)
    assert splits == [select.split_of(number.to_bytes(32, "big"), 0, 0.25) for number in range(2000)]
    assert {select.split_of(bytes(32), seed, 0.0) for seed in range(50)} == {"train"}


def test_groups_are_closed_when_they_are_full_and_hold_one_source():
    sizes = [("a", 5), ("a", 5), ("a", 1), ("b", 1), ("b", 100), ("b", 1), ("b", 0)]
    assert select.groups(sizes, 10) == [0, 0, 1, 0, 0, 1, 1]
    assert select.groups([], 10) == []


def test_funnel_adds_up():
    """By step and source, of several units; what is not run says so; nothing is lost between entered and left."""
    other = Source("own", "folder", "own", thresholds=Thresholds(nsfw=None))
    config = dataclasses.replace(CONFIG, sources=(SOURCE, other), models=Models(embedding="e"), order="cheap")
    units = [
        ("web", tables(*BAD.values(), {}, {"width": 5000, "height": 40})),
        ("own", tables(BAD[3], BAD[3])),
        ("web", tables({"luminance": 1.0}, {"luminance": 0.0}, {"luminance": 1.0})),
        ("web", tables()),
    ]
    decisions = [(name, select.decide(config, config.source(name), given)) for name, given in units]
    web, own = funnels(config, decisions)
    rows = {row["name"]: row for row in web.rows()}
    assert list(rows) == [
        "corrupt", "area", "clarity", "entropy", "luminance", "watermark", "nsfw", "aesthetic", "duplicates",
        "not used",
    ]  # fmt: skip
    assert [name for name, row in rows.items() if not row["ran"]] == ["watermark", "aesthetic"]
    assert rows["luminance"]["reasons"] == {"too bright": 2, "too dark": 2}
    assert rows["corrupt"]["entered"] == web.images == 14
    for above, below in itertools.pairwise(web.rows()):
        assert above["left"] == above["entered"] - above["dropped"] == below["entered"]
    assert web.rows()[-1]["left"] == web.kept == 3  # the good one, and those without watermark and aesthetic networks
    assert rows["not used"]["reasons"] == {select.NO_BUCKET: 1}
    assert (own.images, own.kept) == (2, 2)
    assert next(row for row in own.rows() if row["name"] == "nsfw")["ran"] is False
