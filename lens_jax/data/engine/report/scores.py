"""The scores that the page has a histogram of, with what they are compared with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lens_jax.data.engine.config import Thresholds

Tables = Mapping[str, pa.Table]


@dataclass(frozen=True)
class Score:
    """A number that a step compares with its threshold."""

    # Of the step, of 1 to 9, and of its threshold in the config.
    step: int
    field: str
    title: str
    # Borders of the histogram's bars; what lies outside counts in the first or last.
    edges: np.ndarray
    # float64 [n] of the tables of a unit, nan where there is none.
    values: Callable[[Tables], np.ndarray]
    # The bars are as wide on a logarithmic scale.
    logarithmic: bool = False

    def bounds(self, thresholds: Thresholds) -> tuple[float, ...]:
        """What is compared with: nothing, one number, or two."""
        value = getattr(thresholds, self.field)
        return () if value is None else tuple(map(float, value)) if isinstance(value, tuple) else (float(value),)

    def bars(self, values: np.ndarray) -> np.ndarray:
        """int64 [bars]: how many of the values, not nan, are in each."""
        inside = np.clip(values, self.edges[0], np.nextafter(self.edges[-1], -np.inf))
        return np.histogram(inside, self.edges)[0]


def column(table: str, name: str) -> Callable[[Tables], np.ndarray]:
    """Values of a column, nan where it is null or its table is not there."""

    def values(tables: Tables) -> np.ndarray:
        if table not in tables:
            return np.full(tables["probe"].num_rows, np.nan)
        return tables[table][name].cast(pa.float64()).to_numpy(zero_copy_only=False)

    return values


def area(tables: Tables) -> np.ndarray:
    """Pixels."""
    return column("probe", "width")(tables) * column("probe", "height")(tables)


def unsafe(tables: Tables) -> np.ndarray:
    """P(medium) + P(high)."""
    if "score" not in tables:
        return np.full(tables["probe"].num_rows, np.nan)
    rows = tables["score"]["nsfw"].to_pylist()
    return np.array([np.nan if row is None else float(row[2]) + float(row[3]) for row in rows], np.float64)


SCORES = (
    Score(2, "area", "area, pixels", np.geomspace(2**10, 2**27, 69), area, True),
    Score(3, "nsfw", "unsafe content, probability", np.linspace(0, 1, 51), unsafe),
    Score(4, "aesthetic", "aesthetic score", np.linspace(1, 10, 55), column("score", "aesthetic")),
    Score(5, "watermark", "watermark, probability", np.linspace(0, 1, 51), column("score", "watermark")),
    Score(
        6, "laplacian", "clarity, variance of the Laplacian", np.geomspace(0.1, 1e5, 61),
        column("measure", "laplacian"), True,
    ),
    Score(7, "entropy", "entropy, bits", np.linspace(0, 8, 65), column("measure", "entropy")),
    Score(8, "luminance", "luminance", np.linspace(0, 1, 51), column("measure", "luminance")),
    Score(9, "cosine", "cosine with the image that was kept", np.linspace(0.8, 1, 101), column("keep", "cosine")),
)  # fmt: skip
