"""All of step 9: exact duplicates, cells, near duplicates, and what is kept.

work/keep/<fingerprint>/exact/        the files that are there several times
work/keep/<fingerprint>/axes/         the axes of short vectors
work/keep/<fingerprint>/cells.npz     the centroids
work/keep/<fingerprint>/pairs/<n>/    near duplicates; lists that decided nothing are made longer in the next round
work/keep/<fingerprint>/resolved/     what becomes of the rows that have a near duplicate
work/keep/<fingerprint>/<unit>.parquet  the table KEEP of a unit

Each is there whole or not at all, and none is made twice.
"""

import json
import shutil
from dataclasses import asdict, dataclass

import numpy as np

from lens_jax.atomic import write_json
from lens_jax.data.engine.dedup.cells import make_cells, sample_size, unit_vectors
from lens_jax.data.engine.dedup.found import Cut, read_found
from lens_jax.data.engine.dedup.near import Pairs, distinct
from lens_jax.data.engine.dedup.priority import mixed
from lens_jax.data.engine.dedup.resolve import Resolved, resolve, starved
from lens_jax.data.engine.dedup.rows import comparable, save_arrays
from lens_jax.data.engine.dedup.short import leading_axes
from lens_jax.data.engine.dedup.task import Axes, Counted, Round, Search, Starved, Task

# Centroids are chosen from so many times more rows than are used, so that a few large units do not make up all of them.
_SAMPLE_FROM = 4


@dataclass(frozen=True)
class Outcome:
    """What was found, for the report."""

    # Rows looked at, and those of them that have a vector.
    rows: int
    vectors: int
    # Rows that are another's exact duplicate, and rows that are dropped as near duplicates.
    exact: int
    near: int
    # Pairs of near duplicates, and rows whose lists of them had to be made longer.
    pairs: int
    starved: int
    # Cells; 0 where nothing was compared.
    cells: int


def find(task: Task, search: Search, compare: bool, centroids: int, max_cell: int, seed: int) -> Outcome:
    """Look for duplicates among the rows of a task, and write what becomes of them; see `outcome.json` there.

    Without `compare` exact duplicates alone are looked for. `centroids` 0 takes the root of the number of vectors.
    """
    path = task.folder / "outcome.json"
    if path.exists():
        return Outcome(**json.loads(path.read_text()))
    task.folder.mkdir(parents=True, exist_ok=True)
    counted = _exact(task, search)
    pairs, again, cells = _no_pairs(task.width), 0, 0
    if compare and counted.vectors and _cells(task, counted, centroids, max_cell, seed):
        cells = len(task.cells().parent)
        pairs, resolved, again = _near(task, search)
    else:
        resolved = resolve(pairs)
    save_arrays(task.folder / "resolved", resolved)
    shutil.rmtree(task.folder / "rows", ignore_errors=True)
    firsts = task.firsts()
    extra = int(firsts.count.sum()) - len(firsts.count)
    near = np.count_nonzero(~resolved.kept)
    outcome = Outcome(counted.rows, counted.vectors, extra, int(near), len(pairs.first), again, cells)
    write_json(path, asdict(outcome))
    return outcome


def _exact(task: Task, search: Search) -> Counted:
    path = task.folder / "counted.json"
    if not path.exists():
        firsts, counted = search.exact(task)
        save_arrays(task.folder / "exact", firsts)
        write_json(path, counted._asdict())
    return task.counted()


def _cells(task: Task, counted: Counted, centroids: int, max_cell: int, seed: int) -> bool:
    """Whether there is anything to compare."""
    path = task.folder / "cells.npz"
    if not path.exists():
        centroids = centroids or max(1, round(counted.vectors**0.5))
        sample = _sample(task, counted.width, sample_size(centroids), seed)
        if not len(sample):
            return False
        save_arrays(task.folder / "axes", Axes(leading_axes(sample, task.cosine)))
        make_cells(sample, counted.vectors, centroids, max_cell, task.reach).save(path)
    return True


def _sample(task: Task, width: int, size: int, seed: int) -> np.ndarray:
    """Unit vectors float32 [at most size, D]: of some units in a random order the rows that an order by id, mixed with
    the seed, begins with. Where all units are among them, it is the same whatever units there are."""
    firsts = task.firsts()
    numbers = np.random.default_rng(seed).permutation(len(task.units))
    keys, vectors, held = [], [], 0
    for number in numbers:
        found = comparable(task.read(task.units[number]), firsts)
        # More than the first `size` of any part cannot be among the first of all.
        some = np.argsort(mixed(found[0], seed))[:size]
        keys.append(found[0][some])
        vectors.append(found[1][some])
        held += len(found[0])
        if held >= _SAMPLE_FROM * size:
            break
    keys = np.concatenate(keys)
    vectors = np.concatenate([np.empty((0, width), np.float16), *(part for part in vectors if len(part))])
    return unit_vectors(vectors[np.argsort(mixed(keys, seed))[:size]])


def _near(task: Task, search: Search) -> tuple[Pairs, Resolved, int]:
    pairs, again = _no_pairs(task.width), 0
    cut = Cut(np.empty(0, f"S{task.width}"), np.empty(0, np.int64))
    number = 0
    while True:
        round = Round(task, number)
        done = round.folder / "done"
        if not done.exists():
            round.folder.mkdir(parents=True, exist_ok=True)
            search.near(round)
            done.touch()
        found, found_cut = read_found(sorted(round.folder.glob("*.parquet")), task.width)
        pairs = distinct([pairs, found])
        cut = Cut(np.concatenate([cut.keys, found_cut.keys]), np.concatenate([cut.cells, found_cut.cells]))
        resolved = resolve(pairs, task.firsts())
        keys = starved(resolved, cut.keys)
        if not len(keys):
            return pairs, resolved, again
        again += len(keys)
        those = np.isin(cut.keys, keys)
        number += 1
        save_arrays(task.folder / "starved" / str(number), Starved(keys, np.unique(cut.cells[those])))
        # Their lists are made anew, and cut off anew.
        cut = Cut(cut.keys[~those], cut.cells[~those])


def _no_pairs(width: int) -> Pairs:
    none = np.empty(0, f"S{width}")
    return Pairs(none, none, np.empty(0, np.float32))
