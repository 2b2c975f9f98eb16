"""The stage `score`: the networks of steps 3 to 5 over what the steps before them leave, in batches of static shape.

In the report's order every image that decodes and is large enough gets all scores. In the cheap order only what no
other step has dropped is scored, network after network, the largest last: what is kept is the same.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lens_jax.data.engine.config import EngineConfig, Thresholds
from lens_jax.data.engine.decode import Limits, Undecodable, decode, make_quiet
from lens_jax.data.engine.measure import weigh
from lens_jax.data.engine.readers import Item, Problem
from lens_jax.data.engine.scorers import open_nsfw
from lens_jax.data.engine.scorers.scorer import Scorer
from lens_jax.data.engine.stage import UnitInput
from lens_jax.data.engine.steps import NETWORKS, ORDERS, STEPS, first_drop, runs
from lens_jax.data.engine.tables import SCORE, vector_column
from lens_jax.data.engine.threads import THREADS, cores, in_order

# The last batch of a unit is filled up to a power of two from here on, so that few shapes are compiled.
_LEAST = 8


class Score:
    """The stage."""

    name, version, reads = "score", 1, ("probe", "measure")

    def settings(self, config: EngineConfig) -> Mapping[str, object]:
        networks = {field: fingerprint(field, getattr(config.models, field)) for field in NETWORKS.values()}
        # Of the thresholds those that decide what is scored. As a set, so that a source more redoes no other.
        names = ["area"] if config.order == "report" else [f for f in vars(config.thresholds) if f != "cosine"]
        seen = {repr([(name, getattr(config.thresholds_of(s), name)) for name in names]) for s in config.sources}
        # Not the size of a batch, which moves the last bit of a score at most.
        return {"networks": networks, "dtype": config.models.dtype, "order": config.order, "thresholds": sorted(seen)}

    def processes(self, config: EngineConfig) -> int | None:
        """One where a network is in JAX: it takes a whole device, and all processors to decode for it."""
        return 1 if on_device(config, NETWORKS.values()) else None

    def open(self, config: EngineConfig) -> Callable[[UnitInput], pa.Table]:
        threads = cores() if self.processes(config) else THREADS
        steps = [step for step in ORDERS[config.order] if step in NETWORKS and getattr(config.models, NETWORKS[step])]
        scorers = {step: load(NETWORKS[step], getattr(config.models, NETWORKS[step]), config) for step in steps}
        make_quiet()
        limits = Limits(config.max_pixels, config.max_bytes, config.strict_jpeg)

        def run(given: UnitInput) -> pa.Table:
            thresholds = config.thresholds_of(given.source)
            asked = _admitted(given, config, thresholds)
            scores = Scores(given.tables["probe"].num_rows)
            if scorers and asked.any():
                images = prepared_images(given, asked, list(scorers.values()), limits, threads)
                goes_on = _cascade(config, thresholds, steps) if config.order == "cheap" else None
                score_images(list(scorers.values()), images, config.models.batch, scores, goes_on)
            return scores.table(given.tables["probe"]["id"])

        return run


def on_device(config: EngineConfig, fields: Iterable[str]) -> bool:
    """Whether a network that one of these fields of Models names is in JAX."""
    named = {(field, getattr(config.models, field)) for field in fields}
    return any(name and (field, name) != ("nsfw", open_nsfw.NAME) for field, name in named)


def fingerprint(field: str, name: str) -> str:
    """What identifies the weights of a network, empty for none."""
    if not name:
        return ""
    if (field, name) == ("nsfw", open_nsfw.NAME):
        return open_nsfw.fingerprint()
    return _module(field).fingerprint(name)


def load(field: str, name: str, config: EngineConfig) -> Scorer:
    """The network that the field of Models names."""
    if (field, name) == ("nsfw", open_nsfw.NAME):
        return open_nsfw.load()
    return _module(field).load(name, config.models.dtype)


# The modules in `scorers` that load a release folder: load(folder, dtype) -> Scorer, fingerprint(folder) -> str.
_MODULES = {"nsfw": "nsfw_eva", "aesthetic": "aesthetic", "watermark": "watermark"}


def _module(field: str):
    return importlib.import_module(f"lens_jax.data.engine.scorers.{_MODULES[field]}")


class Scores:
    """The columns of tables.SCORE while they are filled."""

    def __init__(self, rows: int):
        self.values = {
            "nsfw": np.zeros((rows, 4), np.float16),
            "aesthetic": np.zeros(rows, np.float32),
            "watermark": np.zeros(rows, np.float32),
        }
        self.missing = {name: np.ones(rows, bool) for name in self.values}

    def put(self, rows: Sequence[int], found: Mapping[str, np.ndarray]) -> None:
        """Columns [n, ...] of these n rows."""
        for name, values in found.items():
            self.values[name][rows] = values
            self.missing[name][rows] = False

    def table(self, ids: pa.ChunkedArray, rows: Sequence[int] | None = None) -> pa.Table:
        """All rows or some, with their ids; null where nothing was put."""
        rows = slice(None) if rows is None else rows
        columns = [ids]
        for name, values in self.values.items():
            absent = self.missing[name][rows]
            of_vectors = values.ndim == 2
            columns.append(vector_column(values[rows], ~absent) if of_vectors else pa.array(values[rows], mask=absent))
        return pa.table(columns, schema=SCORE)


@dataclass(frozen=True)
class Prepared:
    """An image as the inputs of several networks."""

    row: int
    inputs: list[np.ndarray]


def prepared_images(
    given: UnitInput, asked: np.ndarray, scorers: Sequence[Scorer], limits: Limits, threads: int = THREADS
) -> Iterator[Prepared | None]:
    """The images of the rows in `asked` (bool [n]), decoded once for all scorers; None for the others."""

    def prepare(task: tuple[int, Item | Problem]) -> Prepared | None:
        row, item = task
        if not asked[row] or isinstance(item, Problem):
            return None
        try:
            pixels = decode(item.data, limits)
        except Undecodable:  # the source has changed since it was measured: there is no score, and `select` says so
            return None
        return Prepared(row, [scorer.prepare(pixels) for scorer in scorers])

    tasks = ((row, item) for row, (_, item) in enumerate(given.items()))
    return in_order(prepare, tasks, weigh, threads)


def score_images(
    scorers: Sequence[Scorer],
    images: Iterator[Prepared | None],
    batch: int,
    scores: Scores,
    goes_on: Callable[[int, Scores, list[int]], np.ndarray] | None = None,
) -> None:
    """Put the scores of `images` into `scores`, one network after the other as their batches fill.

    goes_on(number of the network, scores, rows) says of rows just scored which the next network gets, bool [n].
    """
    waiting: list[list[Prepared]] = [[] for _ in scorers]

    def advance(number: int, least: int) -> None:
        scorer, size = scorers[number], _batch(scorers[number], batch)
        while len(waiting[number]) >= least:
            taken, waiting[number] = waiting[number][:size], waiting[number][size:]
            rows = [image.row for image in taken]
            scores.put(rows, _scored(scorer, [image.inputs[number] for image in taken], size))
            if number + 1 < len(scorers):
                on = np.ones(len(rows), bool) if goes_on is None else goes_on(number, scores, rows)
                waiting[number + 1] += [image for image, further in zip(taken, on) if further]
                advance(number + 1, _batch(scorers[number + 1], batch))

    for image in images:
        if image is not None:
            waiting[0].append(image)
            advance(0, _batch(scorers[0], batch))
    for number in range(len(scorers)):
        advance(number, 1)


def _batch(scorer: Scorer, batch: int) -> int:
    return getattr(scorer, "batch", batch)


def _scored(scorer: Scorer, inputs: list[np.ndarray], size: int) -> dict[str, np.ndarray]:
    filled = min(size, max(_LEAST, 1 << (len(inputs) - 1).bit_length()))
    stacked = np.zeros((max(filled, len(inputs)), *inputs[0].shape), inputs[0].dtype)
    stacked[: len(inputs)] = inputs
    found = scorer.score(stacked)
    return {name: np.asarray(found[name], np.float32)[: len(inputs)] for name in scorer.columns}


def _admitted(given: UnitInput, config: EngineConfig, thresholds: Thresholds) -> np.ndarray:
    """bool [n]: what the steps before the networks leave."""
    order = ORDERS[config.order]
    before = order[: min(order.index(step) for step in NETWORKS)]
    return first_drop(given.tables, config, thresholds, before)[0] == 0


def _cascade(
    config: EngineConfig, thresholds: Thresholds, steps: Sequence[int]
) -> Callable[[int, Scores, list[int]], np.ndarray]:
    """By the very comparison that `select` makes, of scores as they are stored."""

    def goes_on(number: int, scores: Scores, rows: list[int]) -> np.ndarray:
        if not runs(steps[number], config, thresholds):
            return np.ones(len(rows), bool)
        ids = pa.array([bytes(16)] * len(rows), pa.binary(16))
        return ~STEPS[steps[number]]({"score": scores.table(ids, rows)}, thresholds).dropped

    return goes_on
