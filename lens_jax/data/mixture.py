"""Which images make a batch: index arithmetic on what was taken so far, and nothing else.

A **feed** is what one stream of a data set (one stored size, one class of caption lengths) gives to batches of one
shape. Feeds of the same shape share its batches. Every feed is endless, permutation after permutation of its images
(`order.py`), and a position is how many images of each were taken. From the position alone follow the shape of the next
batch and how many images of each feed are in it, so a run goes on exactly wherever it stood, also with other batch
sizes: no image of an epoch is lost or repeated.

Both choices are stride scheduling with jitter. Image i of a feed with weight w has the time (i + u) / w, u in [0, 1)
drawn from the seed and i, and images come in the order of their times; so do batches, with the images of all feeds of
their shape. Hence shares are exact to an image, or a batch, at every moment, and the order is random all the same.
"""

import hashlib
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from lens_jax.data.buckets import Bucket
from lens_jax.data.permutation import mix
from lens_jax.errors import LensError

# Separate the uses of one seed.
_SHAPE, _IMAGE, _ROWS = 11, 12, 13
# Batches whose draws are kept, and every how many the counts are kept: reading ahead goes back no further.
_KEPT, _MARK = 4096, 64


class Shape(NamedTuple):
    """What all images of a batch have in common; what a program is compiled for."""

    # Size of the images.
    bucket: Bucket
    # Bound on the tokens of their captions (see `Stream`); 0 where none is known.
    text_class: int = 0

    @classmethod
    def of(cls, batch: Mapping) -> "Shape":
        """The shape of a batch that the pipeline gave."""
        return cls(Bucket(*batch["bucket"]), batch["text_class"])

    def __str__(self) -> str:
        return f"{self.bucket} text {self.text_class}" if self.text_class else str(self.bucket)


@dataclass(frozen=True)
class Feed:
    """Images of one stream, on their way into batches of one shape."""

    # Names it in checkpoints: data set, stored size and class, shape. The same wherever the data set lies.
    name: str
    # The shape of its batches.
    shape: Shape
    # Images of the stream.
    records: int
    # How many of its images are taken relative to other feeds'.
    weight: float

    @property
    def key(self) -> int:
        """64 bits that stand for its name."""
        return _key(self.name)


class Part(NamedTuple):
    """Images of one feed in a batch: places start to start + count of its endless stream."""

    # Number of the feed.
    feed: int
    start: int
    count: int


class Draw(NamedTuple):
    """What a batch is made of."""

    # Of the batch, counted from the start of the run.
    number: int
    shape: Shape
    # Rows of the batch; more than the parts have images only at the end of a finite plan.
    size: int
    parts: tuple[Part, ...]
    # A random number.
    random: int


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data. Plain values, stored with the checkpoint."""

    # Batches taken.
    batches: int = 0
    # The data sets: where each lay, by fingerprint.
    data: Mapping[str, str] = field(default_factory=dict)
    # What else the order of a feed depends on.
    order: Mapping[str, int] = field(default_factory=dict)
    # Images taken of each feed.
    taken: Mapping[str, int] = field(default_factory=dict)
    # What was taken of each when the weights became what they are, and these: shares count from there on.
    since: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict:
        """Plain values, for `from_json`."""
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values, where: str) -> "Position":
        """Back from `to_json`; LensError names `where` for anything else."""
        count = lambda x: type(x) is int and x >= 0
        number = lambda x: type(x) in (int, float) and math.isfinite(x) and x >= 0
        kinds = {"data": lambda x: isinstance(x, str), "order": count, "taken": count, "since": count,
                 "weights": number}  # fmt: skip
        if not isinstance(values, Mapping) or set(values) != {"batches", *kinds} or not count(values["batches"]):
            raise LensError(f"{where}: no position in the data (batches, {', '.join(kinds)})")
        for name, accepted in kinds.items():
            if not isinstance(values[name], Mapping):
                raise LensError(f"{where}: {name} of the position must be an object")
            for key, value in values[name].items():
                if not (isinstance(key, str) and accepted(value)):
                    raise LensError(f"{where}: {name}[{key!r:.80}] of the position is {value!r:.40}")
        return cls(**values)


START = Position()


class Plan:
    """The batches of a run from a position on: `draw(n)` is the n-th from there. Thread safe.

    Draws follow one another, so they are computed in order, once, and the newest are kept; an older one is found again
    from the nearest count that is kept, at the latest from the start. With `once` every image of every feed comes
    once, and `len` says in how many batches.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        sizes: Mapping[Shape, int],
        seed: int,
        start: Position = START,
        once: bool = False,
    ):
        used = [number for number, feed in enumerate(feeds) if feed.records and feed.weight > 0]
        if not used:
            raise LensError("no images to make batches of")
        self._feeds, self._sizes, self._seed, self._once = feeds, sizes, seed, once
        self._start = _weighted(start, {feeds[number].name: feeds[number].weight for number in used})
        self._shapes = sorted({feeds[number].shape for number in used})
        self._members = [np.array([n for n in used if feeds[n].shape == shape]) for shape in self._shapes]
        self._weights = np.array([self._start.weights.get(feed.name, 0.0) for feed in feeds])
        self._shape_weights = np.array([self._weights[members].sum() for members in self._members])
        self._keys = np.array([feed.key for feed in feeds], np.uint64)
        self._shape_keys = [_key(str(shape)) for shape in self._shapes]
        self._since = np.array([self._start.since.get(feed.name, 0) for feed in feeds], np.int64)
        taken = np.array([self._start.taken.get(feed.name, 0) for feed in feeds], np.int64)
        self._lock = threading.Lock()
        self._draws: dict[int, Draw] = {}
        self._marks = {0: taken}
        self._ahead = _Walk(self, 0, taken)

    def __len__(self) -> int:
        """Batches of a plan that takes every image once."""
        return sum(
            -(-sum(self._feeds[n].records for n in members) // self._sizes[shape])
            for shape, members in zip(self._shapes, self._members)
        )

    def draw(self, number: int) -> Draw:
        """What the batch `number`, counted from the plan's start, is made of."""
        with self._lock:
            if number not in self._draws and number < self._ahead.at:
                return self._walk_to(number).step()
            while self._ahead.at <= number:
                draw, at = self._ahead.step(), self._ahead.at
                self._draws[at - 1] = draw
                self._draws.pop(at - 1 - _KEPT, None)
                if at % _MARK == 0:
                    self._marks[at] = self._ahead.taken.copy()
                    if len(self._marks) > 1 + _KEPT // _MARK:
                        del self._marks[sorted(self._marks)[1]]  # the start stays
            return self._draws[number]

    def position_after(self, count: int) -> Position:
        """Where a run stands that has taken `count` batches of this plan, whatever was read ahead."""
        with self._lock:
            taken = self._walk_to(count).taken
        counts = {feed.name: int(number) for feed, number in zip(self._feeds, taken) if number}
        # Feeds that are not in use now keep what was taken of them.
        taken = {**self._start.taken, **counts}
        return replace(self._start, batches=self._start.batches + count, taken=taken)

    def _walk_to(self, number: int) -> "_Walk":
        mark = max(mark for mark in self._marks if mark <= number)
        walk = _Walk(self, mark, self._marks[mark])
        while walk.at < number:
            walk.step()
        return walk

    def _time(self, group: int, taken: np.ndarray) -> float:
        """When the next batch of a shape is due."""
        members = self._members[group]
        total, since = int(taken[members].sum()), int(self._since[members].sum())
        size = self._sizes[self._shapes[group]]
        if self._once and total >= sum(self._feeds[n].records for n in members):
            return math.inf
        jitter = float(_unit(mix(self._seed, _SHAPE, self._shape_keys[group], total)))
        if self._once:
            # A beginning is to be a fair sample: nearly regular turns, and chance only where shapes are as frequent.
            jitter = 0.45 + 0.1 * jitter
        return (total - since + jitter * size) / self._shape_weights[group]

    def _shares(self, members: np.ndarray, taken: np.ndarray, size: int) -> np.ndarray:
        """Images of each feed among the next `size` of a shape."""
        if len(members) == 1:
            return np.array([size])
        weights, relative = self._weights[members], taken[members] - self._since[members]
        # Up to this time at least `size` images are due, since of each feed all but one at most are due by its share.
        until = (relative.sum() + size + len(members)) / weights.sum()
        due = np.maximum(0, np.ceil(until * weights).astype(np.int64) - relative)
        owners = np.repeat(np.arange(len(members)), due)
        ahead = np.arange(len(owners)) - np.repeat(np.cumsum(due) - due, due)
        jitter = _unit(mix(self._seed, _IMAGE, self._keys[members][owners], taken[members][owners] + ahead))
        times = (relative[owners] + ahead + jitter) / weights[owners]
        return np.bincount(owners[np.argsort(times, kind="stable")[:size]], minlength=len(members))


class _Walk:
    """The images taken before batch `at`, and the way to the next."""

    def __init__(self, plan: Plan, at: int, taken: np.ndarray):
        self._plan, self.at, self.taken = plan, at, taken.copy()
        self._times = np.array([plan._time(group, taken) for group in range(len(plan._shapes))])

    def step(self) -> Draw:
        """The draw of batch `at`, which is then taken."""
        plan, group = self._plan, int(np.argmin(self._times))
        shape, members = plan._shapes[group], plan._members[group]
        size = images = plan._sizes[shape]
        total = int(self.taken[members].sum())
        if plan._once:
            images = min(size, sum(plan._feeds[n].records for n in members) - total)
            if images <= 0:
                raise IndexError(f"batch {self.at} of {len(plan)}")
        shares = plan._shares(members, self.taken, images)
        parts = tuple(Part(int(n), int(self.taken[n]), int(share)) for n, share in zip(members, shares) if share)
        random = int(mix(plan._seed, _ROWS, plan._shape_keys[group], total))
        draw = Draw(plan._start.batches + self.at, shape, size, parts, random)
        self.taken[members] += shares
        self._times[group] = plan._time(group, self.taken)
        self.at += 1
        return draw


def batch_shares(feeds: Sequence[Feed], sizes: Mapping[Shape, int]) -> dict[Shape, float]:
    """The share of all batches that are of each shape, in the long run."""
    rates: dict[Shape, float] = {}
    for feed in feeds:
        rates[feed.shape] = rates.get(feed.shape, 0.0) + feed.weight / sizes[feed.shape]
    total = sum(rates.values())
    return {shape: rate / total for shape, rate in sorted(rates.items()) if rate}


def check_position(position: Position, data: Mapping[str, str], order: Mapping[str, int], where: str) -> Position:
    """The position with what is read now; LensError where it was reached with other data or in another order.

    A data set may be new, and starts from nothing; one that is gone or changed would be read from the start again.
    """
    for fingerprint, path in position.data.items():
        if fingerprint not in data:
            raise LensError(
                f"{', '.join(data.values())}: not the data set that {where} was trained on (fingerprint "
                f"{', '.join(data)}; it had {fingerprint}, then at {path}); use another `out` for a new run"
            )
    for name, value in position.order.items():
        if order.get(name) != value:
            raise LensError(
                f"data.{name} is {order.get(name)}, but {where} has read in the order of {value} so far, and images "
                f"would be repeated; give --data.{name.replace('_', '-')} {value}"
            )
    return replace(position, data=dict(data), order=dict(order))


def _weighted(start: Position, weights: Mapping[str, float]) -> Position:
    """`start` under these weights. Where they are new, shares count from here: what was taken is no debt."""
    total = math.fsum(weights.values())
    weights = {name: weight / total for name, weight in weights.items()}
    same = weights.keys() == start.weights.keys() and all(
        math.isclose(start.weights[name], weight, rel_tol=1e-9) for name, weight in weights.items()
    )
    return start if same else replace(start, weights=weights, since=dict(start.taken))


def _unit(bits: np.ndarray) -> np.ndarray:
    """64 random bits to [0, 1)."""
    return (bits >> np.uint64(11)).astype(np.float64) / (1 << 53)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
