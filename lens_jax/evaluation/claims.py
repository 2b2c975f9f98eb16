"""`lens-jax claims RUN ...`: what runs of reinforcement learning changed on held-out prompts, as a table in Markdown.

From the journals of the first and the last evaluation of each run, which have every image's rewards. The images of a
prompt are not independent, so all intervals are over prompts: of the mean of the prompts' means, and of the mean of
their differences. Both evaluations draw the same prompts from the same noise. Of several runs, a prompt's mean is over
all of their images: that interval is of prompts, given these runs; how far runs differ is seen in their own rows.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from lens_jax.errors import LensError
from lens_jax.posttraining.judging import FOLDER, mark_of, read_journal
from lens_jax.posttraining.prompts.prompt import read_prompts

# Of a normal distribution, 95 %.
_Z = 1.959964
_EVALUATION = re.compile(r"evaluation_(\d{6,})\.jsonl")


@dataclasses.dataclass(frozen=True)
class ClaimsConfig:
    """Print what runs of reinforcement learning changed on the prompts held out from them, as a table in Markdown."""

    # Folders of runs that were evaluated before the first step and after others: the same run with several seeds.
    runs: tyro.conf.Positional[tuple[str, ...]]
    # The reward that counts, or a part of one; scene/all is 1 where all that is asked is there.
    reward: str = "scene/all"

    def __post_init__(self):
        if not self.runs:
            raise LensError("give at least one run: lens-jax claims RUN [RUN ...]")


@dataclasses.dataclass(frozen=True)
class Run:
    """What is read of a run."""

    path: Path
    seed: int
    # Steps at which it was evaluated first and last.
    first: int
    last: int
    # By prompt, the mean of its images, before and after; of the same prompts.
    before: Mapping[str, float]
    after: Mapping[str, float]
    # By measure, means over all images.
    guards_before: Mapping[str, float]
    guards_after: Mapping[str, float]
    # Of each held-out prompt, and those of the prompts that were learnt from.
    categories: Mapping[str, str]
    learnt: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: shares of images, and 95 % intervals over prompts."""

    what: str
    prompts: int
    before: tuple[float, float]
    after: tuple[float, float]
    change: tuple[float, float]

    @property
    def apart(self) -> bool:
        """Whether the intervals of before and after do not overlap."""
        return abs(self.after[0] - self.before[0]) > self.before[1] + self.after[1]


def claims(config: ClaimsConfig) -> str:
    """Print the table; its text."""
    text = table([read(Path(run), config.reward) for run in config.runs])
    print(text, end="")
    return text


def read(path: Path, reward: str) -> Run:
    """LensError for what is no run of `lens-jax rl`, or one that was not evaluated twice."""
    file = path / "config.json"
    try:
        values = json.loads(file.read_bytes())
        prompts, held_out = values["prompts"], values["evaluation"]["prompts"]
        without = frozenset(values.get("prompts_without", ()))
        mark = mark_of([values["rewards"]["train"], values["rewards"]["evaluation"]])
        seed = int(values["seed"])
    except OSError as error:
        raise LensError(f"{file}: cannot be read: {error.strerror}; give the folder of a run of lens-jax rl") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise LensError(f"{file}: not the config of a run of lens-jax rl") from None
    found = sorted((int(m[1]), f) for f in (path / FOLDER).glob("*.jsonl") if (m := _EVALUATION.fullmatch(f.name)))
    if len(found) < 2 or not held_out:
        raise LensError(
            f"{path}: {len(found)} evaluations, and two are compared; give a run with evaluation.prompts and .every"
        )
    (first, old), (last, new) = found[0], found[-1]
    (before, guards_before), (after, guards_after) = (_evaluation(file, mark, reward) for file in (old, new))
    if before.keys() != after.keys():
        raise LensError(f"{new}: has other prompts than {old}; the run is not complete")
    categories = {prompt.id: prompt.category for prompt in read_prompts(held_out)}
    if unknown := before.keys() - categories.keys():
        raise LensError(f"{held_out}: has no prompt {min(unknown)!r}, which {path} was evaluated on")
    learnt = frozenset(prompt.category for prompt in read_prompts(prompts)) - without
    return Run(path, seed, first, last, before, after, guards_before, guards_after, categories, learnt)


def _evaluation(file: Path, mark: str, reward: str) -> tuple[dict[str, float], dict[str, float]]:
    """(by prompt the mean of its images, by measure the mean over prompts) of a journal."""
    lines = read_journal(file, mark).values()
    means = {}
    for line in lines:
        answers = [score[reward] for score in line["scores"] if reward in score]
        if answers:
            means[str(line.get("prompt"))] = float(np.mean(answers))
    if not means:
        known = sorted({name for line in lines for score in line["scores"] for name in score})
        raise LensError(f"{file}: no reward {reward!r}; accepted: {', '.join(known) or 'none, it has no answers'}")
    names = sorted({name for line in lines for name in line["guards"]})
    return means, {name: float(np.mean([line["guards"][name] for line in lines])) for name in names}


def means(runs: Sequence[Run], wanted: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """(before, after) of each prompt of these categories, over the images of all runs."""
    wanted = set(wanted)
    ids = sorted({id for run in runs for id in run.before if run.categories[id] in wanted})
    mean = lambda which, id: float(np.mean([getattr(run, which)[id] for run in runs if id in run.before]))
    return np.array([mean("before", id) for id in ids]), np.array([mean("after", id) for id in ids])


def row(what: str, runs: Sequence[Run], wanted: Iterable[str]) -> Row | None:
    """Of the prompts of these categories; None where there are none."""
    before, after = means(runs, wanted)
    if not len(before):
        return None
    return Row(what, len(before), _estimate(before), _estimate(after), _estimate(after - before))


def _estimate(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    half = _Z * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), half


def rows(runs: Sequence[Run]) -> list[Row]:
    """What was learnt from, of each run and of all together; then each category of all, the learnt ones first."""
    learnt = frozenset.union(*(run.learnt for run in runs))
    known = sorted({run.categories[id] for run in runs for id in run.before} - {""})
    found = [row(f"learnt from, seed {run.seed} ({run.path.name})", [run], run.learnt) for run in runs]
    if len(runs) > 1:
        found.append(row(f"**learnt from, all {len(runs)} runs**", runs, learnt))
    for category in sorted(known, key=lambda category: category not in learnt):
        name = category if category in learnt else f"{category} (not learnt from)"
        found.append(row(name, runs, [category]))
    return [one for one in found if one]


def table(runs: Sequence[Run]) -> str:
    """Shares in percent, changes in points, and the measures of the images as ratios."""
    lines = ["| held-out prompts | number | before | after | points | intervals apart |", "|---|---|---|---|---|---|"]
    share = lambda found: f"{100 * found[0]:.1f} ± {100 * found[1]:.1f} %"
    for one in rows(runs):
        points = f"{100 * one.change[0]:+.1f} ± {100 * one.change[1]:.1f}"
        apart = "yes" if one.apart else "no"
        lines.append(f"| {one.what} | {one.prompts} | {share(one.before)} | {share(one.after)} | {points} | {apart} |")
    steps = ", ".join(dict.fromkeys(f"{run.first} and {run.last}" for run in runs))
    lines += ["", f"Evaluated at steps {steps}. {_signal(runs)} Guards, after over before: {_guards(runs)}."]
    return "\n".join(lines) + "\n"


def _signal(runs: Sequence[Run]) -> str:
    """What became of the prompts that were learnt from by how often they were right before: those that never or always
    were gave nothing to tell good from bad by."""
    before, after = means(runs, frozenset.union(*(run.learnt for run in runs)))
    parts = []
    for name, chosen in (("never", before <= 0), ("sometimes", (before > 0) & (before < 1)), ("always", before >= 1)):
        change = f" ({100 * before[chosen].mean():.0f} to {100 * after[chosen].mean():.0f} %)" if chosen.any() else ""
        parts.append(f"{name} {int(chosen.sum())}{change}")
    return f"Prompts of what was learnt from, by how often their images were right before: {', '.join(parts)}."


def _guards(runs: Sequence[Run]) -> str:
    mean = lambda which, name: float(np.mean([getattr(run, which)[name] for run in runs]))
    names = sorted(set.intersection(*(set(run.guards_before) & set(run.guards_after) for run in runs)))
    ratios: dict[str, Any] = {}
    for name in names:
        before = mean("guards_before", name)
        ratios[name] = mean("guards_after", name) / before if before else math.nan
    return ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()) or "none were measured"
