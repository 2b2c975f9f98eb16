"""Batches are a function of what was taken: shares are exact, and no image of an epoch is lost or repeated."""

import json
from collections import Counter

import numpy as np
import pytest

from lens_jax.data.buckets import Bucket
from lens_jax.data.mixture import START, Feed, Plan, Position, Shape, batch_shares, check_position
from lens_jax.errors import LensError

SMALL, LARGE = Shape(Bucket(16, 16), 64), Shape(Bucket(32, 32), 128)
# Two feeds share the batches of the small shape.
FEEDS = (
    Feed("a/16x16/64", SMALL, 100, 100.0),
    Feed("b/16x16/64", SMALL, 37, 74.0),
    Feed("a/32x32/128", LARGE, 53, 53.0),
    Feed("a/8x8/0", Shape(Bucket(8, 8)), 0, 0.0),
)
SIZES = {SMALL: 8, LARGE: 6, Shape(Bucket(8, 8)): 4}


def read(plan: Plan, count: int, start: int = 0) -> list[tuple[int, int]]:
    """(feed, place in its endless stream) of every image of so many batches."""
    draws = [plan.draw(number) for number in range(start, start + count)]
    assert all(sum(part.count for part in draw.parts) == draw.size for draw in draws)
    return [(p.feed, place) for draw in draws for p in draw.parts for place in range(p.start, p.start + p.count)]


def saved(position: Position) -> Position:
    return Position.from_json(json.loads(json.dumps(position.to_json())), "here")


def test_a_run_whose_batch_size_changes_twice_loses_and_repeats_nothing():
    """Every feed is read place by place without a gap, whatever the batches: epochs are places by the number."""
    position, seen, shapes = START, [], Counter()
    for sizes, count in (
        (SIZES, 41),
        ({s: n // 2 for s, n in SIZES.items()}, 33),
        ({s: 3 * n for s, n in SIZES.items()}, 57),
    ):
        plan = Plan(FEEDS, sizes, 5, position)
        seen += read(plan, count)
        shapes.update(plan.draw(n).shape for n in range(count))
        assert [plan.draw(n).number for n in (0, count - 1)] == [position.batches, position.batches + count - 1]
        position = saved(plan.position_after(count))
    for feed in range(3):
        places = [place for number, place in seen if number == feed]
        assert places == list(range(len(places)))
        assert len(places) > 2 * FEEDS[feed].records  # over epochs
        assert position.taken[FEEDS[feed].name] == len(places)
    # Shares by weight hold over all of it: an image of b is seen twice as often.
    counts = np.array([sum(number == feed for number, _ in seen) for feed in range(3)])
    expected = np.array([100, 74, 53]) / 227 * counts.sum()
    assert np.abs(counts - expected).max() <= 24
    assert abs(counts[0] / counts[1] - 100 / 74) < 0.02


def test_resuming_equals_no_interruption_wherever_it_was_read_to():
    whole = Plan(FEEDS, SIZES, 1)
    expected = [whole.draw(n) for n in range(300)]
    assert whole.draw(7) == expected[7]
    for stopped in (0, 1, 64, 130):
        ahead = Plan(FEEDS, SIZES, 1)
        ahead.draw(stopped + 20)  # read ahead, which must not count
        resumed = Plan(FEEDS, SIZES, 1, saved(ahead.position_after(stopped)))
        order = np.random.default_rng(0).permutation(300 - stopped)
        assert [resumed.draw(int(n)) for n in order] == [expected[stopped + n] for n in order]
        assert resumed.position_after(150) == whole.position_after(stopped + 150)
    assert any(Plan(FEEDS, SIZES, 2).draw(n) != expected[n] for n in range(3))


def test_old_draws_are_found_again_in_bounded_memory(monkeypatch):
    from lens_jax.data import mixture

    expected = [Plan(FEEDS, SIZES, 1).draw(n) for n in range(40)]
    monkeypatch.setattr(mixture, "_KEPT", 128)
    plan = Plan(FEEDS, SIZES, 1)
    plan.draw(2000)
    assert len(plan._draws) <= 128
    assert len(plan._marks) <= 4
    assert [plan.draw(n) for n in range(40)] == expected


def test_shapes_take_turns_by_their_share_at_every_moment():
    """Within two batches of the exact share, always; and not in a fixed cycle."""
    plan, shares = Plan(FEEDS, SIZES, 3), batch_shares(FEEDS, SIZES)
    assert sum(shares.values()) == pytest.approx(1)
    shapes = [plan.draw(n).shape for n in range(2000)]
    for shape, share in shares.items():
        ahead = np.cumsum([s == shape for s in shapes]) - share * np.arange(1, 2001)
        assert np.abs(ahead).max() < 2
    runs = "".join("ab"[shape == LARGE] for shape in shapes)
    assert {"aaa", "aab", "aba", "baa", "bab", "bb"} <= {runs[i : i + n] for i in range(1990) for n in (2, 3)}


def test_new_weights_start_from_where_the_run_is():
    """What a feed was given under the old weights is no debt under the new: shares are right from the first batch."""
    before = Plan(FEEDS, SIZES, 0)
    position = before.position_after(500)
    new = [Feed(f.name, f.shape, f.records, f.weight * (9 if f.shape == LARGE else 1)) for f in FEEDS]
    plan = Plan(new, SIZES, 0, saved(position))
    shares = batch_shares(new, SIZES)
    counts = Counter(plan.draw(n).shape for n in range(40))
    assert abs(counts[LARGE] - 40 * shares[LARGE]) <= 2
    assert read(plan, 1)[0][1] == position.taken[FEEDS[read(plan, 1)[0][0]].name]
    # A feed that is left out keeps its place.
    without = Plan(FEEDS[:2], SIZES, 0, plan.position_after(40)).position_after(10)
    assert without.taken[FEEDS[2].name] == plan.position_after(40).taken[FEEDS[2].name]


def test_once_gives_every_image_once_and_any_beginning_in_proportion():
    feeds = [Feed(f.name, f.shape, f.records, float(f.records)) for f in FEEDS]
    plan = Plan(feeds, SIZES, 0, once=True)
    draws = [plan.draw(n) for n in range(len(plan))]
    seen = [(p.feed, place) for draw in draws for p in draw.parts for place in range(p.start, p.start + p.count)]
    assert sorted(seen) == [(n, place) for n, feed in enumerate(feeds) for place in range(feed.records)]
    for beginning in (4, 9, 17):
        images = Counter(draw.shape for draw in draws[:beginning] for _ in range(draw.size))
        assert abs(images[LARGE] / images.total() - 53 / 190) < 10 / images.total()
    with pytest.raises(IndexError):
        plan.draw(len(plan))


def test_position_is_checked():
    data, order = {"f00d": "data/a"}, {"seed": 0, "shards_together": 64}
    position = check_position(START, data, order, "the run")
    assert check_position(position, {**data, "beef": "data/b"}, order, "the run").data == {**data, "beef": "data/b"}
    with pytest.raises(LensError, match=r"data/a: not the data set that the run was .*beef; it had f00d"):
        check_position(position, {"beef": "data/a"}, order, "the run")
    with pytest.raises(LensError, match=r"data.shards_together is 8, .* --data.shards-together 64"):
        check_position(position, data, {**order, "shards_together": 8}, "the run")
    good = Plan(FEEDS, SIZES, 0, position).position_after(3).to_json()
    assert saved(Position.from_json(good, "here")).to_json() == good
    bad = [None, [], {**good, "more": 1}, {**good, "batches": -1}, {**good, "taken": {"a": 1.5}}, {**good, "data": []},
           {**good, "weights": {"a": float("nan")}}, {k: v for k, v in good.items() if k != "since"}]  # fmt: skip
    for values in bad:
        with pytest.raises(LensError, match=r"^here: .*position"):
            Position.from_json(values, "here")
