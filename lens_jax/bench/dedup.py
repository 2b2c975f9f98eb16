"""`lens-jax bench dedup`: near duplicates by cells, beside all pairs by numpy and by faiss, in processor seconds."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lens_jax.bench import measure, vectors
from lens_jax.data.engine.dedup import run
from lens_jax.data.engine.dedup.embedded import Embedded
from lens_jax.data.engine.dedup.found import read_found
from lens_jax.errors import LensError

# Rows in a block of all pairs, and rows that faiss is asked about at a time.
_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class DedupBench:
    """Made vectors in clusters, a twentieth of them planted beside others: pairs above a cosine of 0.985."""

    rows: int = 100_000
    # Numbers of a vector.
    dim: int = 768
    # How far beyond its cell a vector is compared; 1 is exact.
    margin: float = 1.0
    # Cells; 0 takes the root of the rows.
    centroids: int = 0
    # What it is compared with, in turn.
    against: tuple[Literal["numpy", "faiss"], ...] = ("numpy",)
    # All pairs are timed on this share of their blocks, chosen evenly, and multiplied up. Below 1 no recall is known.
    share: float = 1.0
    # Runs of each; the least of the seconds is reported.
    repeats: int = 1
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "rows", "dim", "repeats")
        if not 0 < self.share <= 1:
            raise LensError(f"--share is {self.share}; it must be above 0 and at most 1")
        if not 0 <= self.margin <= 1:
            raise LensError(f"--margin is {self.margin}; it must lie within 0 to 1")


def bench_dedup(bench: DedupBench) -> dict:
    """Time the whole search, disk included, and all pairs; print and return the figures."""
    names, values = vectors.keys(bench.rows), vectors.clustered(bench.rows, bench.dim)
    with tempfile.TemporaryDirectory() as folder:
        read = vectors.store(Path(folder) / "rows", values, names)
        runs: dict[str, Callable[[], Any]] = {"cells": lambda: _cells(bench, Path(folder), read)}
        if "numpy" in bench.against:
            runs["numpy"] = lambda: _numpy(bench, values)
        if "faiss" in bench.against:
            faiss = _faiss()
            runs["faiss"] = lambda: _with_faiss(faiss, bench, values)
        seconds, found = _in_turn(runs, bench.repeats)
    outcome, pairs = found["cells"]
    result = {
        "rows": bench.rows,
        "cells": outcome.cells,
        "pairs": len(pairs.first),
        "dropped": outcome.near,
        "cpu_seconds": seconds["cells"],
    }
    wanted = vectors.as_set(pairs)
    order = np.argsort(names)
    for name in runs.keys() - {"cells"}:
        result[f"{name}_cpu_seconds"] = seconds[name] / bench.share
        result[f"ratio_to_{name}"] = seconds[name] / bench.share / seconds["cells"]
        if bench.share == 1:
            first, second = found[name]
            place = np.empty(bench.rows, np.int64)
            place[order] = np.arange(bench.rows)
            swap = place[first] > place[second]
            first, second = np.where(swap, second, first), np.where(swap, first, second)
            all_pairs = vectors.as_set((names[first], names[second]))
            result[f"{name}_pairs"] = len(all_pairs)
            # Pairs that float32 puts on the other side of the threshold are not told from pairs that were missed.
            result[f"recall_of_{name}"] = len(wanted & all_pairs) / max(len(all_pairs), 1)
    return measure.report(bench, result)


def _in_turn(runs: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """The least processor seconds of each, over all threads and child processes, and what it returned."""
    seconds, found = {}, {}
    for _ in range(repeats):
        for name, call in runs.items():
            time.sleep(0.1)  # threads of the library before may still spin
            before = os.times()
            found[name] = call()
            after = os.times()
            used = sum(after[:4]) - sum(before[:4])
            seconds[name] = min(used, seconds.get(name, used))
    return seconds, found


def _cells(bench: DedupBench, folder: Path, read: vectors.Stored):
    with tempfile.TemporaryDirectory(dir=folder) as work:
        units = max(1, bench.rows // 2000)
        task = vectors.make_task(Path(work), read, units, bench.margin)
        outcome = run.find(task, Embedded(), True, bench.centroids, 20_000, 0)
        pairs, _ = read_found(sorted((task.folder / "pairs").glob("*/*.parquet")), vectors.WIDTH)
    return outcome, pairs


def _blocks(bench: DedupBench) -> list[int]:
    starts = list(range(0, bench.rows, _BLOCK))
    wanted = max(1, round(bench.share * len(starts)))
    # Those in the middle of equal parts: blocks of all pairs, each once, grow shorter towards the end.
    return [starts[(2 * number + 1) * len(starts) // (2 * wanted)] for number in range(wanted)]


def _numpy(bench: DedupBench, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs in float32, each once."""
    units = values.astype(np.float32)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    parts = []
    for start in _blocks(bench):
        products = units[start : start + _BLOCK] @ units[start:].T
        row, column = np.nonzero(products > vectors.COSINE)
        later = column > row
        parts.append((start + row[later], start + column[later]))
    return tuple(np.concatenate(column) for column in zip(*parts))


def _with_faiss(faiss, bench: DedupBench, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IndexFlatIP.range_search of all rows among all rows; it finds each pair twice."""
    units = values.astype(np.float32)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(bench.dim)
    index.add(units)
    parts = []
    for start in _blocks(bench):
        limits, _, column = index.range_search(units[start : start + _BLOCK], vectors.COSINE)
        row = start + np.repeat(np.arange(len(limits) - 1), np.diff(limits).astype(np.int64))
        later = column > row
        parts.append((row[later], column[later]))
    return tuple(np.concatenate(column) for column in zip(*parts))


def _faiss():
    try:
        import faiss
    except ImportError as error:
        raise LensError(f"--against faiss needs faiss ({error}): pip install faiss-cpu") from None
    return faiss
