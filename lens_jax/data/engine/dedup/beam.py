"""The search for duplicates as Apache Beam pipelines, and a stage of the engine as one.

The graphs are of Create, FlatMap, ParDo, GroupByKey and Reshuffle alone, without side inputs, state or timers, and each
ends in one collection: other runners than Beam's own leave out some of the rest. What is computed is written by the
functions themselves as files that are there whole or not at all, so that work done twice changes nothing; the
collections at the end only count. All workers must see the same work folder.

Keys are integers: a runner may group by Python's hash, which for bytes differs from process to process.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lens_jax.atomic import write_json
from lens_jax.data.engine.dedup import exact
from lens_jax.data.engine.dedup.cells import Cells, unit_vectors, usable
from lens_jax.data.engine.dedup.found import Cut, write_found
from lens_jax.data.engine.dedup.near import Pairs, compare
from lens_jax.data.engine.dedup.priority import part_of
from lens_jax.data.engine.dedup.rows import comparable, load_arrays, save_arrays
from lens_jax.data.engine.dedup.short import shorten
from lens_jax.data.engine.dedup.task import Counted, Round, Task
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError as error:
    raise LensError(f"Beam needs apache-beam ({error}): pip install 'lens-jax[beam]'") from None


def runner_options(workers: int = 1, arguments: Sequence[str] = ()) -> PipelineOptions:
    """Options of a pipeline: those on a command line, or else Beam's runner in this process with so many workers.

    That runner is asked for by its own name: under `DirectRunner` Beam first tries to download another.
    """
    arguments = list(arguments)
    if not any(word.split("=")[0] == "--runner" for word in arguments):
        arguments.append("--runner=FnApiRunner")
        if workers > 1:
            arguments += [f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing"]
    return PipelineOptions(arguments)


@dataclass(frozen=True)
class BeamSearch:
    """The search by pipelines (see task.Search)."""

    # Of the runner, as on its command line.
    arguments: tuple[str, ...] = ()
    # Processes of Beam's own runner.
    workers: int = 1
    # Pieces that files are grouped into by their hash, and pairs by the second of them.
    parts: int = 64

    def exact(self, task: Task) -> tuple[exact.Firsts, Counted]:
        """The files that are there several times."""
        folder = task.folder / "firsts"
        # Of a search that did not end, and may have had other parts.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        with beam.Pipeline(options=runner_options(self.workers, self.arguments)) as pipeline:
            _ = (
                pipeline
                | "Units" >> beam.Create(list(task.units))
                | "Spread" >> beam.Reshuffle()
                | "Files" >> beam.ParDo(_Files(task, self.parts)).with_output_types(tuple[int, bytes])
                | "ByHash" >> beam.GroupByKey()
                | "Firsts" >> beam.ParDo(_Firsts(task, folder, self.parts)).with_output_types(int)
            )
        found = [
            load_arrays(folder / str(part), exact.Firsts) for part in range(self.parts) if _is_done(folder / str(part))
        ]
        counted = np.zeros(3, np.int64)
        for unit in task.units:
            rows, vectors, width = json.loads((folder / f"{unit.id}.json").read_text())
            counted += (rows, vectors, 0)
            counted[2] = max(counted[2], width)
        none = exact.firsts(np.empty(0, f"S{exact.SHA_BYTES}"), np.empty(0, f"S{task.width}"))
        return exact.repeated(exact.together([none, *found])), Counted(*counted.tolist())

    def near(self, round: Round) -> None:
        """The pairs of all cells, a table for each part."""
        with beam.Pipeline(options=runner_options(self.workers, self.arguments)) as pipeline:
            _ = (
                pipeline
                | "Units" >> beam.Create(list(round.task.units))
                | "Spread" >> beam.Reshuffle()
                | "ToCells" >> beam.ParDo(_ToCells(round)).with_output_types(tuple[int, bytes])
                | "ByCell" >> beam.GroupByKey()
                | "Compare" >> beam.ParDo(_Compare(round, self.parts)).with_output_types(tuple[int, bytes])
                | "BySecond" >> beam.GroupByKey()
                | "Write" >> beam.ParDo(_Write(round)).with_output_types(int)
            )


class _Files(beam.DoFn):
    """A unit to (part, the first row of each of its files)."""

    def __init__(self, task: Task, parts: int):
        self._task, self._parts = task, parts

    def process(self, unit: Unit) -> Iterator[tuple[int, bytes]]:
        rows = self._task.read(unit)
        counted = len(rows.keys), int(np.count_nonzero(usable(rows.vectors))), rows.vectors.shape[1]
        # Beside the parts, which know nothing of rows without a copy.
        write_json(self._task.folder / "firsts" / f"{unit.id}.json", counted)
        found = exact.firsts(rows.sha256, rows.keys)
        records = np.empty(len(found.key), _file_type(self._task))
        records["sha256"], records["key"], records["count"] = found
        # Parts in the order of hashes.
        start = records["sha256"].astype(f"S{exact.SHA_BYTES}").view(np.uint8).reshape(-1, exact.SHA_BYTES)[:, :4]
        part = np.ascontiguousarray(start).view(">u4").ravel().astype(np.int64) * self._parts >> 32
        yield from _by(part, records)


class _Firsts(beam.DoFn):
    """All rows of a part to the number of its files that are there several times, which are written."""

    def __init__(self, task: Task, folder: Path, parts: int):
        self._task, self._folder, self._parts = task, folder, parts

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[int]:
        part, values = element
        records = np.frombuffer(b"".join(values), _file_type(self._task))
        columns = (np.ascontiguousarray(records[name]) for name in ("sha256", "key", "count"))
        found = exact.repeated(exact.firsts(*columns))
        save_arrays(self._folder / str(part), found)
        yield len(found.key)


class _ToCells(beam.DoFn):
    """A unit to (cell, the rows of the unit that are compared in it)."""

    def __init__(self, round: Round):
        self._round = round

    def setup(self) -> None:
        self._firsts, self._cells = self._round.task.firsts(), self._round.task.cells()
        self._starved = self._round.starved()

    def process(self, unit: Unit) -> Iterator[tuple[int, bytes]]:
        task = self._round.task
        keys, vectors = comparable(task.read(unit), self._firsts)
        if not len(keys):
            return
        placed = self._cells.place(unit_vectors(vectors), task.reach)
        if self._starved is not None:
            again = np.isin(placed.cell, self._starved.cells)
            placed = type(placed)(*(column[again] for column in placed))
        records = np.empty(len(placed.row), _row_type(task, self._cells))
        records["key"], records["home"], records["vector"] = keys[placed.row], placed.home, vectors[placed.row]
        yield from _by(placed.cell, records)


class _Compare(beam.DoFn):
    """All rows of a cell to (part, near duplicates and rows whose lists may be cut off)."""

    def __init__(self, round: Round, parts: int):
        self._round, self._parts = round, parts

    def setup(self) -> None:
        task = self._round.task
        self._cells, self._axes, self._starved = task.cells(), task.axes(), self._round.starved()

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[tuple[int, bytes]]:
        cell, values = element
        task = self._round.task
        records = np.frombuffer(b"".join(values), _row_type(task, self._cells))
        keys = np.ascontiguousarray(records["key"])
        only = None if self._starved is None else np.isin(keys, self._starved.keys)
        # Made here and not sent along: that would be 9 % more to shuffle.
        short = shorten(self._axes, unit_vectors(records["vector"]))
        whole = records["vector"].__getitem__
        pairs, cut = compare(keys, records["home"], short, whole, task.cosine, self._round.limit, only)
        found = np.zeros(len(pairs.first) + len(cut), _found_type(task))
        split = len(pairs.first)
        found["first"][:split], found["second"][:split], found["cosine"][:split] = pairs
        found["cell"][:split] = _PAIR
        found["second"][split:], found["cell"][split:] = cut, cell
        yield from _by(part_of(found["second"], self._parts), found)


class _Write(beam.DoFn):
    """All that was found of a part to its number of pairs, which are written."""

    def __init__(self, round: Round):
        self._round = round

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[int]:
        part, values = element
        found = np.frombuffer(b"".join(values), _found_type(self._round.task))
        pairs, cut = found[found["cell"] == _PAIR], found[found["cell"] != _PAIR]
        column = lambda rows, name: np.ascontiguousarray(rows[name])
        columns = Pairs(*(column(pairs, name) for name in ("first", "second", "cosine")))
        write_found(
            self._round.folder / f"part-{part:06d}.parquet", columns, Cut(column(cut, "second"), column(cut, "cell"))
        )
        yield len(pairs)


_PAIR = -1


def _file_type(task: Task) -> np.dtype:
    return np.dtype([("sha256", f"S{exact.SHA_BYTES}"), ("key", f"S{task.width}"), ("count", "<i8")])


def _row_type(task: Task, cells: Cells) -> np.dtype:
    return np.dtype([("key", f"S{task.width}"), ("home", "?"), ("vector", "<f2", (cells.centroids.shape[1],))])


def _found_type(task: Task) -> np.dtype:
    key = f"S{task.width}"
    return np.dtype([("first", key), ("second", key), ("cosine", "<f4"), ("cell", "<i8")])


def _by(numbers: np.ndarray, records: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """(number, the bytes of its records)."""
    order = np.argsort(numbers, kind="stable")
    numbers, records = numbers[order], records[order]
    starts = np.flatnonzero(np.concatenate([[True], numbers[1:] != numbers[:-1]])) if len(numbers) else ()
    for start, end in zip(starts, [*starts[1:], len(numbers)]):
        yield int(numbers[start]), records[start:end].tobytes()


def _is_done(folder: Path) -> bool:
    return (folder / "done").exists()


class RunUnits(beam.PTransform):
    """Units to the totals of a stage over all of them, one element: {"units": 6, "ok": 26, ...}.

    `open` is called once in each worker, and what it returns once for each unit: it makes the unit's table where there
    is none, and what it returns has the `counts` of it. `run_unit.Runner` is such, of a stage.
    """

    def __init__(self, open: Callable[[], Callable[[Unit], Any]]):
        super().__init__()
        self._open = open

    def expand(self, units):
        return (
            units
            | "Spread" >> beam.Reshuffle()
            | "Run" >> beam.ParDo(_Run(self._open))
            | "Together" >> beam.Map(lambda counts: (0, counts))
            | "All" >> beam.GroupByKey()
            | "Sum" >> beam.MapTuple(_total)
        )


class _Run(beam.DoFn):
    def __init__(self, open: Callable[[], Callable[[Unit], Any]]):
        self._open = open

    def setup(self) -> None:
        self._run = self._open()

    def process(self, unit: Unit) -> Iterator[dict[str, int]]:
        found = self._run(unit)
        yield {"units": 1, **dict(found.counts)}


def _total(_, counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for some in counts:
        total.update(some)
    return dict(total)
