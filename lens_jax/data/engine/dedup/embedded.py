"""The search for duplicates on one machine, without Beam: rows and cells are files mapped into memory.

What is there already is not made again, so that the same command goes on after a kill.
"""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lens_jax.atomic import new_directory
from lens_jax.data.engine.dedup import exact
from lens_jax.data.engine.dedup.cells import unit_vectors, usable
from lens_jax.data.engine.dedup.found import Cut, write_found
from lens_jax.data.engine.dedup.near import Pairs, compare
from lens_jax.data.engine.dedup.rows import comparable, load_arrays, save_arrays
from lens_jax.data.engine.dedup.short import shorten
from lens_jax.data.engine.dedup.task import Counted, Round, Task
from lens_jax.data.prepare_report import progress
from lens_jax.errors import LensError

# Placed rows that one table of pairs is made of.
_GROUP = 1 << 17
# Files that are put together before more are read.
_FIRSTS = 1 << 20


@dataclass(frozen=True)
class Embedded:
    """The search in this process, or with more `workers` in processes of this machine."""

    workers: int = 1
    show: bool = False

    def exact(self, task: Task) -> tuple[exact.Firsts, Counted]:
        """The files that are there several times."""
        none = np.empty(0, f"S{exact.SHA_BYTES}"), np.empty(0, f"S{task.width}"), np.empty(0, np.int64)
        held, waiting, size = exact.Firsts(*none), [], 0
        rows = vectors = width = 0
        for unit in progress(task.units, len(task.units), "exact duplicates", self.show):
            found = task.read(unit)
            waiting.append(exact.firsts(found.sha256, found.keys))
            size += len(found.keys)
            rows, vectors = rows + len(found.keys), vectors + np.count_nonzero(usable(found.vectors))
            width = max(width, found.vectors.shape[1])
            if size >= _FIRSTS:
                held, waiting, size = exact.together([held, *waiting]), [], 0
        return exact.repeated(exact.together([held, *waiting])), Counted(rows, int(vectors), width)

    def near(self, round: Round) -> None:
        """The pairs of all cells, a table for each hundred thousand rows of them."""
        folder = round.task.folder / "rows"
        if not (folder / "done").exists():
            _store(round.task, folder, self.show)
        placed = load_arrays(folder / "placed", _Placed)
        # Cells go together until they have enough rows.
        starts = (
            np.concatenate([[0], np.flatnonzero(np.diff(placed.cell)) + 1]) if len(placed.cell) else np.empty(0, int)
        )
        group = starts // _GROUP
        firsts = starts[np.concatenate([[True], group[1:] != group[:-1]])] if len(starts) else starts
        spans = list(zip(firsts.tolist(), [*firsts[1:].tolist(), len(placed.cell)]))
        waiting = [(number, span) for number, span in enumerate(spans) if not _path(round, number).exists()]
        for _ in progress(self._run(round, waiting), len(waiting), "near duplicates", self.show):
            pass

    def _run(self, round: Round, waiting: list[tuple[int, tuple[int, int]]]) -> Iterator[None]:
        work = functools.partial(_compare, round)
        if self.workers <= 1:
            yield from map(work, waiting)
            return
        spawn = multiprocessing.get_context("spawn")
        with _one_thread_each(), concurrent.futures.ProcessPoolExecutor(self.workers, spawn) as pool:
            try:
                yield from pool.map(work, waiting)
            except BrokenProcessPool:
                raise LensError("near duplicates: a worker was ended; the same command goes on from there") from None


class _Placed(NamedTuple):
    row: np.ndarray
    cell: np.ndarray
    home: np.ndarray


class _Stored(NamedTuple):
    keys: np.ndarray
    vectors: np.ndarray
    short: np.ndarray


def _path(round: Round, number: int) -> Path:
    return round.folder / f"{number:06d}.parquet"


def _store(task: Task, folder: Path, show: bool) -> None:
    """Rows in the order of units, and which of them are in each cell."""
    firsts, cells, axes = task.firsts(), task.cells(), task.axes()
    parts, start = [_Placed(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, bool))], 0
    with new_directory(folder, True, "done") as partial:
        with contextlib.ExitStack() as files:
            opened = [files.enter_context(open(partial / name, "wb")) for name in _Stored._fields]
            for unit in progress(task.units, len(task.units), "rows to cells", show):
                keys, vectors = comparable(task.read(unit), firsts)
                if not len(keys):
                    continue
                directions = unit_vectors(vectors)
                for file, values in zip(opened, (keys, vectors, shorten(axes, directions))):
                    file.write(np.ascontiguousarray(values).tobytes())
                found = cells.place(directions, task.reach)
                parts.append(_Placed(found.row + start, found.cell, found.home))
                start += len(keys)
        row, cell, home = (np.concatenate(column) for column in zip(*parts))
        order = np.argsort(cell, kind="stable")
        save_arrays(partial / "placed", _Placed(row[order], cell[order], home[order]))
        (partial / "done").touch()


def _stored(folder: Path, task: Task) -> _Stored:
    width, axes = task.axes().shape

    def mapped(name: str, dtype: str, *shape: int) -> np.ndarray:
        path = folder / name
        if not path.stat().st_size:
            return np.empty((0, *shape), dtype)
        return np.memmap(path, dtype, "r").reshape(-1, *shape)

    return _Stored(mapped("keys", f"S{task.width}"), mapped("vectors", "<f2", width), mapped("short", "<f4", axes + 1))


def _compare(round: Round, numbered: tuple[int, tuple[int, int]]) -> None:
    """The pairs of some whole cells, as one table."""
    number, (start, end) = numbered
    task = round.task
    folder = task.folder / "rows"
    placed = load_arrays(folder / "placed", _Placed)
    stored = _stored(folder, task)
    starved = round.starved()
    span = np.asarray(placed.cell[start:end])
    borders = [*(np.flatnonzero(np.diff(span)) + 1).tolist(), len(span)]
    found, cuts, first = [], [], 0
    for last in borders:
        cell = int(span[first])
        if starved is None or np.isin(cell, starved.cells):
            rows = placed.row[start + first : start + last]
            keys = stored.keys[rows]
            only = None if starved is None else np.isin(keys, starved.keys)
            home = placed.home[start + first : start + last]
            whole = lambda places, rows=rows: stored.vectors[rows[places]]
            pairs, cut = compare(keys, home, stored.short[rows], whole, task.cosine, round.limit, only)
            found.append(pairs)
            cuts.append(Cut(cut, np.full(len(cut), cell)))
        first = last
    none = np.empty(0, f"S{task.width}")
    found.append(Pairs(none, none, np.empty(0, np.float32)))
    cuts.append(Cut(none, np.empty(0, np.int64)))
    together = lambda parts, kind: kind(*(np.concatenate(column) for column in zip(*parts)))
    write_found(_path(round, number), together(found, Pairs), together(cuts, Cut))


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started inside multiply matrices in one thread each: with one a core all would wait for each other."""
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
