"""The nine cleaning steps in the report's order, as pure functions of stored scores (report, section 2).

Each says which images it drops, by which value and why. They do not depend on each other, so the order changes which
step an image is counted at, and never whether it is kept; and a new threshold computes no score again.

An image is dropped as well where the score of a step that runs is missing or not a number: nothing passes unseen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lens_jax.data.engine.config import EngineConfig, Thresholds
from lens_jax.data.engine.tables import vectors_of

NAMES = {
    1: "corrupt", 2: "area", 3: "nsfw", 4: "aesthetic", 5: "watermark", 6: "clarity", 7: "entropy", 8: "luminance",
    9: "duplicates",
}  # fmt: skip
# What is cheap to compute first, and of the networks the largest last.
ORDERS = {"report": (1, 2, 3, 4, 5, 6, 7, 8, 9), "cheap": (1, 2, 6, 7, 8, 5, 3, 4, 9)}
# The field of Models that names the network whose score a step compares.
NETWORKS = {3: "nsfw", 4: "aesthetic", 5: "watermark"}
MISSING, NOT_A_NUMBER = "no score", "score not a number"


@dataclass(frozen=True)
class Verdict:
    """What a step says of n images."""

    # bool [n].
    dropped: np.ndarray
    # float64 [n], what is compared with the threshold; not a number where there is nothing to compare.
    value: np.ndarray
    # object [n], strings; read where `dropped`.
    reason: np.ndarray


# By the name of a stage its table; row i of each is about the same image.
Tables = Mapping[str, pa.Table]


def corrupt(tables: Tables, thresholds: Thresholds) -> Verdict:
    """Step 1: what does not decode whole."""
    problem = np.array(tables["measure"]["problem"].to_pylist(), object)
    return Verdict(problem != None, np.full(len(problem), np.nan), problem)  # noqa: E711  (elementwise)


def area(tables: Tables, thresholds: Thresholds) -> Verdict:
    """Step 2: of less than `thresholds.area` pixels."""
    pixels = numbers(tables["probe"], "width") * numbers(tables["probe"], "height")
    return _compared(pixels, pixels < thresholds.area, "too small")


def nsfw(tables: Tables, thresholds: Thresholds) -> Verdict:
    """Step 3: P(medium) + P(high) of at least `thresholds.nsfw`."""
    levels, given = vectors_of(tables["score"]["nsfw"])
    unsafe = np.full(len(levels), np.nan)
    unsafe[given] = levels[given, 2:].astype(np.float32).sum(1)
    return _compared(unsafe, unsafe >= thresholds.nsfw, "unsafe", given)


def aesthetic(tables: Tables, thresholds: Thresholds) -> Verdict:
    """Step 4: an aesthetic score below `thresholds.aesthetic`."""
    score = numbers(tables["score"], "aesthetic")
    return _compared(score, score < np.float32(thresholds.aesthetic), "not aesthetic", valid(tables, 4))


def watermark(tables: Tables, thresholds: Thresholds) -> Verdict:
    """Step 5: a probability of a watermark of at least `thresholds.watermark`."""
    score = numbers(tables["score"], "watermark")
    return _compared(score, score >= np.float32(thresholds.watermark), "watermark", valid(tables, 5))


def clarity(tables: Tables, thresholds: Thresholds) -> Verdict:
    """Step 6: a variance of the Laplacian below `thresholds.laplacian`."""
    score = numbers(tables["measure"], "laplacian")
    return _compared(score, score < np.float32(thresholds.laplacian), "blurred")


def entropy(tables: Tables, thresholds: Thresholds) -> Verdict:
    """Step 7: an entropy below `thresholds.entropy`."""
    score = numbers(tables["measure"], "entropy")
    return _compared(score, score < np.float32(thresholds.entropy), "flat")


def luminance(tables: Tables, thresholds: Thresholds) -> Verdict:
    """Step 8: a luminance below the first or above the second of `thresholds.luminance`."""
    score = numbers(tables["measure"], "luminance")
    low, high = map(np.float32, thresholds.luminance)
    verdict = _compared(score, (score < low) | (score > high), "too dark")
    verdict.reason[score > high] = "too bright"
    return verdict


def duplicates(tables: Tables, thresholds: Thresholds) -> Verdict:
    """Step 9: what a kept image is a duplicate of. Who is kept was decided over all units."""
    dropped = tables["keep"]["duplicate_of"].is_valid().to_numpy()
    reason = np.full(len(dropped), "duplicate", object)
    return Verdict(dropped, numbers(tables["keep"], "cosine"), reason)


STEPS: dict[int, Callable[[Tables, Thresholds], Verdict]] = {
    1: corrupt, 2: area, 3: nsfw, 4: aesthetic, 5: watermark, 6: clarity, 7: entropy, 8: luminance, 9: duplicates,
}  # fmt: skip
_THRESHOLD = {3: "nsfw", 4: "aesthetic", 5: "watermark", 6: "laplacian", 7: "entropy", 8: "luminance", 9: "cosine"}


def runs(step: int, config: EngineConfig, thresholds: Thresholds) -> bool:
    """Whether a step is part of this run: its threshold is not None, and a network of its is named.

    Step 9 without an embedding is about copies of the same bytes alone.
    """
    if step in NETWORKS and not getattr(config.models, NETWORKS[step]):
        return False
    return step not in _THRESHOLD or getattr(thresholds, _THRESHOLD[step]) is not None


def first_drop(
    tables: Tables, config: EngineConfig, thresholds: Thresholds, steps: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each image the first of `steps` that drops it: (its number or 0, the value or nan, the reason or None), [n]
    each."""
    rows = tables["probe"].num_rows
    number, value, reason = np.zeros(rows, np.int8), np.full(rows, np.nan), np.full(rows, None, object)
    for step in steps:
        if runs(step, config, thresholds):
            verdict = STEPS[step](tables, thresholds)
            new = verdict.dropped & (number == 0)
            number[new], value[new], reason[new] = step, verdict.value[new], verdict.reason[new]
    return number, value, reason


def numbers(table: pa.Table, column: str) -> np.ndarray:
    """A column as float64 [n], nan for null."""
    return table[column].cast(pa.float64()).to_numpy()


def valid(tables: Tables, step: int) -> np.ndarray:
    """bool [n]: where the score of a network is there."""
    return tables["score"][NETWORKS[step]].is_valid().to_numpy()


def _compared(value: np.ndarray, fails: np.ndarray, reason: str, given: np.ndarray | None = None) -> Verdict:
    """Dropped where it fails, or where there is no value to compare."""
    absent = np.isnan(value)
    reasons = np.full(len(value), reason, object)
    reasons[absent] = MISSING
    if given is not None:
        reasons[absent & given] = NOT_A_NUMBER
    return Verdict(fails | absent, value, reasons)
