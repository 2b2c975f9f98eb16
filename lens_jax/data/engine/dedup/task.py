"""What both ways to look for duplicates are given: on this machine (embedded.py) and by Beam (beam.py)."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from lens_jax.data.engine.dedup.cells import Cells, load
from lens_jax.data.engine.dedup.exact import Firsts
from lens_jax.data.engine.dedup.near import LIMIT
from lens_jax.data.engine.dedup.rows import Rows, load_arrays
from lens_jax.data.engine.unit import Unit

# Up to so many vectors the search is exact. Above, a margin of 1 is too dear: made vectors are sent to 29 cells instead
# of 2.7, and of 100,000 no pair was missed at 0.2.
_EXACT_UP_TO, _MARGIN_ABOVE = 10_000_000, 0.2
# A list that decided nothing is made so many times as long.
_LONGER = 16


@dataclass(frozen=True)
class Task:
    """The rows and where results go."""

    units: tuple[Unit, ...]
    # The rows of a unit. Beam sends it to its workers.
    read: Callable[[Unit], Rows]
    folder: Path
    # Bytes of a key.
    width: int
    # Two rows above it are duplicates, and how far beyond its cell a vector is compared (see cells.py); None: by their
    # number.
    cosine: float
    margin: float | None
    # How many neighbours of a row are listed at first.
    limit: int = LIMIT

    @property
    def reach(self) -> float:
        """The distance that vectors are sent beyond the border of their cell. They must have been counted."""
        margin = margin_for(self.counted().vectors) if self.margin is None else self.margin
        return margin * float(np.sqrt(2 - 2 * self.cosine))

    def counted(self) -> "Counted":
        """What the search for exact duplicates went through; written when it has ended."""
        return Counted(**json.loads((self.folder / "counted.json").read_text()))

    def firsts(self) -> Firsts:
        """The files that are there several times; found before near duplicates are looked for."""
        return load_arrays(self.folder / "exact", Firsts)

    def cells(self) -> Cells:
        """The cells; made before near duplicates are looked for."""
        return load(self.folder / "cells.npz")

    def axes(self) -> np.ndarray:
        """The axes of short vectors (see short.py), float32 [D, d]; made with the cells."""
        return load_arrays(self.folder / "axes", Axes).axes


def margin_for(vectors: float) -> float:
    """How far beyond its cell each of so many vectors is compared, where the config does not say."""
    return 1.0 if vectors <= _EXACT_UP_TO else _MARGIN_ABOVE


class Axes(NamedTuple):
    """Those of short vectors, as they are stored."""

    axes: np.ndarray


class Starved(NamedTuple):
    """Rows that are compared again, keys sorted, and the cells in which they are."""

    keys: np.ndarray
    cells: np.ndarray


@dataclass(frozen=True)
class Round:
    """One comparison of all rows, or another of some with longer lists."""

    task: Task
    number: int = 0

    @property
    def folder(self) -> Path:
        """Where what it finds is written."""
        return self.task.folder / "pairs" / str(self.number)

    @property
    def limit(self) -> int:
        """How many neighbours of a row are listed, a cell."""
        return self.task.limit * _LONGER**self.number

    def starved(self) -> Starved | None:
        """Which rows; None is all."""
        return load_arrays(self.task.folder / "starved" / str(self.number), Starved) if self.number else None


class Counted(NamedTuple):
    """What the search for exact duplicates went through."""

    # Rows, rows with a vector, and the length of a vector.
    rows: int
    vectors: int
    width: int


class Search(Protocol):
    """A way to look for duplicates. Both give the same."""

    def exact(self, task: Task) -> tuple[Firsts, Counted]:
        """The files that are there several times."""

    def near(self, round: Round) -> None:
        """Writes tables of found.py into the folder of the round. Those that are there may be kept."""
