"""`lens-jax evaluate --compare A B ...`: reports of the scene benchmark side by side, the first against the others.

Reports are comparable where they asked for the same scenes in the same words from the same noise. Then every image of
one has its counterpart in the other, and the interval of a difference is that of pairs: it counts only the images that
one model draws right and the other does not, so it is far narrower than what the intervals of two shares suggest.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lens_jax.console import make_console
from lens_jax.errors import LensError
from lens_jax.evaluation.config import EvaluateConfig

NAME = "scenes.json"
# Of a normal distribution, 95 %.
_Z = 1.959964
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Report:
    """What is compared of a report."""

    path: Path
    # What was drawn, and with how many steps, what guidance and how many passes an image.
    checkpoint: str
    steps: int
    guidance: float
    passes: int
    # What each image was asked for, and whether it was right, in order.
    asked: tuple[tuple[str, str, str], ...]
    right: np.ndarray
    # Whether the second opinion knows its objects again, 0 or 1; NaN of images that have none.
    second: np.ndarray
    # By density, and in it by prompt: how much the prompt's images differ.
    diversity: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def run(config: EvaluateConfig, console: Console | None = None) -> list[Report]:
    """Print the table; the reports. LensError for one that cannot be read, or that asked for something else."""
    if len(config.compare) < 2:
        raise LensError(f"--compare {' '.join(config.compare)}: give at least two reports, the first to compare with")
    reports = [read(path) for path in config.compare]
    for report in reports[1:]:
        check_comparable(reports[0], report)
    show(reports, console or make_console())
    return reports


def read(path: str | os.PathLike) -> Report:
    """A report, by its file or the folder that it is in; LensError for anything else."""
    file = Path(path) / NAME if Path(path).is_dir() else Path(path)
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise LensError(f"{file}: over {_MAX_BYTES} bytes, no report of the scene benchmark")
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise LensError(f"{file}: cannot be read: {error.strerror}; write it with --bench scenes --out") from None
    except (ValueError, RecursionError):
        raise LensError(f"{file}: not JSON") from None
    try:
        drawn, images = values["drawn_with"], values["images"]
        asked = tuple((_text(one["task"]), _text(one["language"]), _text(one["caption"])) for one in images)
        each = {name: found["by_prompt"] for name, found in values["diversity"].items()}
        report = Report(
            file,
            checkpoint=_text(values["config"]["checkpoint"]),
            steps=_whole(drawn["num_inference_steps"]),
            guidance=_number(drawn["guidance_scale"]),
            passes=_whole(drawn["network_passes"]),
            asked=asked,
            right=np.array([_truth(one["right"]) for one in images]),
            second=np.array(
                [math.nan if one.get("second") is None else _truth(one["second"]) for one in images], float
            ),
            diversity={_text(n): {_text(p): _number(v) for p, v in found.items()} for n, found in each.items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise LensError(
            f"{file}: no report of `lens-jax evaluate --bench scenes` of this version ({type(error).__name__}: "
            f"{str(error)[:60]})"
        ) from None
    if not asked:
        raise LensError(f"{file}: a report without images")
    return report


def check_comparable(first: Report, other: Report) -> None:
    """LensError where two reports did not ask for the same."""
    if first.asked != other.asked:
        differ = [i for i, pair in enumerate(zip(first.asked, other.asked)) if pair[0] != pair[1]]
        what = f"image {differ[0]} is of {other.asked[differ[0]]!s:.90}" if differ else "some images are missing"
        raise LensError(
            f"{other.path}: asked for something else than {first.path} ({len(other.asked)} and {len(first.asked)} "
            f"images; {what}); give both runs the same --seed, --count, --sizes, --tasks, --languages and --data"
        )
    for density in first.diversity.keys() & other.diversity.keys():
        if first.diversity[density].keys() != other.diversity[density].keys():
            raise LensError(
                f"{other.path}: diversity of other {density} prompts than in {first.path}; give both runs the same "
                "--diversity-prompts"
            )


def difference(first: np.ndarray, other: np.ndarray) -> Estimate:
    """How much larger the share of right images of the other is; both bool [n], image by image."""
    gained, lost, total = int((other & ~first).sum()), int((first & ~other).sum()), len(first)
    value = (gained - lost) / total
    # One more of either kind, so that two reports that agree everywhere have an interval at all (Agresti and Min).
    variance = (gained + lost + 1 - (gained - lost) ** 2 / (total + 2)) / (total + 2) ** 2
    middle, half = (gained - lost) / (total + 2), _Z * math.sqrt(variance)
    return Estimate(value, middle - half, middle + half)


def ratio(first: Mapping[str, float], other: Mapping[str, float]) -> Estimate:
    """The other's mean over the first's, prompt by prompt; NaN where the first's is 0."""
    a, b = (np.array([values[name] for name in first]) for values in (first, other))
    if not a.mean():
        return Estimate(*[float("nan")] * 3)
    value = float(b.mean() / a.mean())
    # Of a ratio of means to first order; one prompt says nothing of how far off it is.
    error = float((b - value * a).std(ddof=1) / math.sqrt(len(a)) / a.mean()) if len(a) > 1 else float("nan")
    return Estimate(value, value - _Z * error, value + _Z * error)


def show(reports: Sequence[Report], console: Console) -> None:
    """A row each; differences are in points, from the first."""
    first, densities = reports[0], [name for name in reports[0].diversity if all(name in r.diversity for r in reports)]
    table = Table(title=f"{len(first.asked)} images each; intervals of 95 %, of pairs of images or prompts")
    table.add_column("model")
    headings = ("steps", "guidance", "passes", "right", "points", "second opinion")
    for heading in (*headings, *(f"diversity, {name}" for name in densities)):
        table.add_column(heading, justify="right")
    for report in reports:
        points, diversity = "", [f"{np.mean(list(report.diversity[name].values())):.4f}" for name in densities]
        if report is not first:
            found = difference(first.right, report.right)
            points = f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
            ratios = [ratio(first.diversity[name], report.diversity[name]) for name in densities]
            diversity = [f"{r.value:.2f} ({r.low:.2f} to {r.high:.2f})" for r in ratios]
        share = f"{100 * report.right.mean():.1f} %"
        second = "" if np.isnan(report.second).all() else f"{100 * np.nanmean(report.second):.1f} %"
        settings = str(report.steps), f"{report.guidance:g}", str(report.passes)
        # A path may have brackets, which would be taken for styles.
        table.add_row(Text(f"{report.checkpoint} ({report.path.parent})"), *settings, share, points, second, *diversity)
    console.print(table)
    if densities:
        console.print(f"diversity: the first's, and the others' as a ratio of it; {len(first.diversity[densities[0]])} "
                      "prompts")  # fmt: skip


# What a report has, checked: ValueError for anything else.


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is no text")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ValueError(f"{value!r:.40} is no number of steps")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} is no finite number")
    return float(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r:.40} is neither true nor false")
    return value
