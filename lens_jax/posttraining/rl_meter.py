"""What a run of reinforcement learning says of its epochs: rewards in all their parts, and how the policy moved."""

import collections
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lens_jax.posttraining.advantages import Advantages
from lens_jax.posttraining.judging import Judged


def describe(
    judged: Judged,
    rewards: np.ndarray,
    advantages: Advantages,
    clip: float,
    categories: Sequence[str],
    sizes: np.ndarray,
    names: Sequence[str],
) -> dict[str, Any]:
    """The record of an epoch.

    Args:
      rewards: [groups, members], what is trained on.
      clip: advantages beyond it are clipped.
      categories: of each group's prompt; sizes: number of each image's size, [groups, members], among `names`.
    """
    valid = advantages.valid
    mean = lambda x: float(np.nanmean(x)) if np.isfinite(x).any() else float("nan")
    by_category = {c: mean(rewards[[own == c for own in categories]]) for c in sorted(set(categories)) if c}
    return {
        "reward": mean(rewards),
        "reward_deviation": float(np.std(rewards[valid])) if valid.any() else float("nan"),
        # A judge's families are among the names: "judge/OCR Alignment".
        "reward_by_name": {name: mean(values) for name, values in sorted(judged.values.items())},
        "reward_by_category": by_category,
        "reward_by_size": {name: mean(rewards[sizes == i]) for i, name in enumerate(names) if (sizes == i).any()},
        "zero_variance_groups": advantages.zero_variance,
        "missing": advantages.missing,
        "advantages_clipped": float((np.abs(advantages.values[valid]) >= clip).mean()) if valid.any() else 0.0,
        "guards": judged.guards,
        "judge_seconds": judged.seconds,
    }


class RlMeter:
    """Sums over the updates since the last record, and the epochs that they were of.

    A step counts when its numbers come, by which time the next epoch may have been drawn.
    """

    def __init__(self):
        self._dispatched: collections.deque[dict[str, Any] | None] = collections.deque()
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
        self._epochs: list[dict[str, Any]] = []

    def dispatch(self, epoch: dict[str, Any] | None) -> None:
        """Count a step that is about to be taken; `epoch` is what is said of one that was drawn for it."""
        self._dispatched.append(epoch)

    def add(self, metrics: dict[str, Any]) -> None:
        """The numbers of the oldest step that was dispatched. Sums are pairs: of a part over rows, and of the rows."""
        epoch = self._dispatched.popleft()
        if epoch is not None:
            self._epochs.append(epoch)
        if metrics["finite"]:
            for name, value in metrics.items():
                if np.shape(value) == (2,) and name != "losses":
                    self._sums[name] += np.asarray(value)

    def record(self, seconds: float) -> dict[str, Any]:
        """Means over what was added."""
        parts = {name: float(total / max(rows, 1)) for name, (total, rows) in self._sums.items()}
        values = {**_mean(self._epochs), **parts}
        self._clear()
        return values

    def note(self, values: dict[str, Any]) -> str:
        """The reward, and how far the policy is from where it started."""
        reward = f"reward {values['reward']:.4f}  " if "reward" in values else ""
        return f"{reward}kl {values.get('kl', 0.0):.3g}  loss {values['loss']:.4f}"


def _mean(epochs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Number by number of those that have it."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for one in epochs for name in one):
        values = [one[name] for one in epochs if name in one]
        if isinstance(values[0], Mapping):
            found[name] = _mean(values)
        else:
            values = [value for value in values if np.isfinite(value)]
            found[name] = float(np.mean(values)) if values else float("nan")
    return found


def evaluated(judged: Judged, categories: Sequence[str]) -> dict[str, Any]:
    """The record of an evaluation: means by reward and by category, and half the width of 95 % intervals by prompt.

    The images of a prompt are not independent, so an interval is that of the mean of the prompts' means.
    """
    found: dict[str, dict] = {name: {} for name in ("by_name", "interval_by_name")}
    found |= {name: {} for name in ("by_category", "interval_by_category")}
    for name, values in sorted(judged.values.items()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a prompt without any answer has no mean
            means = np.nanmean(values, axis=1)
        found["by_name"][name], found["interval_by_name"][name] = _mean_and_half(means)
        for category in sorted(set(categories) - {""}):
            own = means[[one == category for one in categories]]
            if np.isfinite(own).any():
                mean, half = _mean_and_half(own)
                found["by_category"].setdefault(name, {})[category] = mean
                found["interval_by_category"].setdefault(name, {})[category] = half
    missing = float(np.mean([np.isnan(values).mean() for values in judged.values.values()])) if judged.values else 1.0
    return {**found, "guards": judged.guards, "missing": missing}


def _mean_and_half(means: np.ndarray) -> tuple[float, float]:
    """Of those that are known: their mean, and half its 95 % interval."""
    known = means[np.isfinite(means)]
    half = 1.96 * known.std(ddof=1) / np.sqrt(len(known)) if len(known) > 1 else np.nan
    return float(known.mean()) if len(known) else float("nan"), float(half)
