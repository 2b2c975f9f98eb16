"""The stage `keep`: for each image whether it is a duplicate, and of which image that is kept.

Its tables follow from all units together, which `run.find` looks through first; then each is made by itself.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from lens_jax.data.engine.config import EngineConfig, Source
from lens_jax.data.engine.dedup import priority
from lens_jax.data.engine.dedup.exact import Firsts, first_of_each
from lens_jax.data.engine.dedup.resolve import Resolved
from lens_jax.data.engine.dedup.rows import Reader, Rows, load_arrays, rows_of
from lens_jax.data.engine.dedup.run import Outcome, find
from lens_jax.data.engine.dedup.task import Search, Task
from lens_jax.data.engine.stage import UnitInput
from lens_jax.data.engine.tables import KEEP
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError

if TYPE_CHECKING:
    from lens_jax.data.engine.layout import Layout

Survivors = Callable[[EngineConfig, Source, Mapping[str, pa.Table]], np.ndarray]


class Keep:
    """The stage. It can be opened once `find_duplicates` has run."""

    name, version, by_item = "keep", 2, False
    reads = ("probe", "measure", "score", "embed")

    def __init__(self, survivors: Survivors, folder: Path | None = None):
        """`survivors` says what the other steps keep; `folder` is the stage's, with what `find_duplicates` wrote."""
        self._survivors, self.folder = survivors, folder

    def reads_of(self, config: EngineConfig, unit: Unit) -> tuple[str, ...]:
        """Without an embedding there is no table of it, and exact duplicates alone are found."""
        return self.reads if config.models.embedding else self.reads[:-1]

    def settings(self, config: EngineConfig) -> Mapping[str, object]:
        """All that changes what is kept: duplicates are looked for among what the other steps keep."""
        return {
            "dedup": repr(config.dedup),
            "thresholds": {source.name: repr(config.thresholds_of(source)) for source in config.sources},
            "cosine": config.thresholds.cosine,
            "buckets": config.buckets,
            "max_upscale": config.max_upscale,
            "embedding": config.models.embedding,
        }

    def open(self, config: EngineConfig) -> Callable[[UnitInput], pa.Table]:
        if self.folder is None:
            raise LensError("stage keep: all units are looked through first, by find_duplicates")
        firsts, resolved = load_arrays(self.folder / "exact", Firsts), load_arrays(self.folder / "resolved", Resolved)

        def table(given: UnitInput) -> pa.Table:
            rows = rows_of(config, given.tables, self._survivors(config, given.source, given.tables))
            return keep_table(given.tables["probe"]["id"], rows, firsts, resolved)

        return table


def find_duplicates(
    config: EngineConfig, layout: "Layout", units: tuple[Unit, ...], survivors: Survivors, search: Search
) -> Outcome:
    """Look through all units; then the stage `keep` can make their tables. Its other stages must have run."""
    task = make_task(config, layout, units, survivors)
    compare = config.thresholds.cosine is not None and bool(config.models.embedding)
    dedup = config.dedup
    return find(task, search, compare, dedup.centroids, dedup.max_cell, dedup.seed)


def make_task(config: EngineConfig, layout: "Layout", units: tuple[Unit, ...], survivors: Survivors) -> Task:
    """What the search for duplicates is given."""
    width = priority.key_bytes(config.dedup.priority)
    cosine = 1.0 if config.thresholds.cosine is None else config.thresholds.cosine
    reader = Reader(config, layout.table, survivors)
    return Task(tuple(units), reader, layout.folder(Keep.name), width, cosine, config.dedup.margin)


def keep_table(ids: pa.ChunkedArray, rows: Rows, firsts: Firsts, resolved: Resolved) -> pa.Table:
    """The table KEEP of a unit with these `ids`. Rows that were not looked at have null in all of it."""
    count = len(ids)
    first = first_of_each(rows.sha256, rows.keys, firsts)
    exact = first != rows.keys
    place, near = _places(resolved.keys, first)
    # Of an exact duplicate's first row, or of the row itself, if that was dropped too.
    onto = np.where(near, resolved.duplicate_of[place] if len(resolved.keys) else -1, -1)
    kept = first.copy()
    kept[onto >= 0] = resolved.keys[onto[onto >= 0]]
    dropped = exact | (onto >= 0)
    cosine = np.ones(len(first), np.float32)
    cosine[onto >= 0] = resolved.cosine[place[onto >= 0]]
    component = _component(rows, firsts, first, resolved, place, near)
    column = lambda values, valid, kind: _scattered(count, rows.index[valid], values[valid], kind)
    everything = np.ones(len(first), bool)
    columns = [
        ids.cast(KEEP.field("id").type),
        _scattered_ids(count, rows.index[dropped], priority.ids(kept[dropped])),
        column(cosine, dropped, pa.float32()),
        column(component, everything, pa.int32()),
    ]
    return pa.table(columns, schema=KEEP)


def _component(rows: Rows, firsts: Firsts, first, resolved: Resolved, place, near) -> np.ndarray:
    """How many images a row is connected with by duplicates of either kind, itself included, int64 [n]."""
    count = np.ones(len(first), np.int64)
    where, repeated = _places(firsts.sha256, rows.sha256)
    if len(firsts.sha256):
        count[repeated] = firsts.count[where[repeated]]
    if len(resolved.keys):
        count[near] = resolved.component[place[near]]
    return count


def _places(table: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where values are in a sorted table, and whether they are there."""
    if not len(table):
        return np.zeros(len(values), np.int64), np.zeros(len(values), bool)
    place = np.minimum(np.searchsorted(table, values), len(table) - 1)
    return place, table[place] == values


def _scattered(count: int, index: np.ndarray, values: np.ndarray, kind: pa.DataType) -> pa.Array:
    full, missing = np.zeros(count, values.dtype), np.ones(count, bool)
    full[index], missing[index] = values, False
    return pa.array(full, mask=missing).cast(kind)


def _scattered_ids(count: int, index: np.ndarray, values: np.ndarray) -> pa.Array:
    found: list[bytes | None] = [None] * count
    for place, value in zip(index.tolist(), values):
        found[place] = value.tobytes()
    return pa.array(found, KEEP.field("duplicate_of").type)
