"""What a distillation says of its steps, and the signs that one is failing, each with the option that helps."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from lens_jax.posttraining.distill_config import DistillConfig

# Records before a sign is told, and before it is told again.
_FIRST, _SILENCE = 10, 50
# Decay of the means that signs are read from: a record is of few samples.
_SMOOTH = 0.9


@dataclasses.dataclass(frozen=True)
class Reference:
    """Latents that the teacher draws as it is deployed: what those of the student are compared with."""

    mean: float
    std: float


class DistillMeter:
    """Sums over the steps since the last record."""

    def __init__(self, config: DistillConfig, say: Callable[[str], None]):
        self._config, self._say = config, say
        # Images of steps that are under way.
        self._dispatched: collections.deque[int] = collections.deque()
        # Of the teacher's samples, once they are drawn: in the first step of a run.
        self.reference: Reference | None = None
        self._records, self._told = 0, collections.defaultdict(lambda: _FIRST)
        self._smoothed: dict[str, Any] = {}
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._images = 0

    def dispatch(self, images: int) -> None:
        """Count the images of a step that is about to be taken."""
        self._dispatched.append(images)

    def add(self, metrics: dict[str, Any]) -> None:
        """The numbers of the oldest step that was dispatched.

        Sums are pairs along their first axis: of a part over rows, and of the rows.
        """
        self._images += self._dispatched.popleft()
        if not metrics["finite"]:
            return
        for name, value in metrics.items():
            value = np.asarray(value, np.float64)
            if value.ndim and value.shape[0] == 2 and name != "losses":
                self._sums[name] = self._sums.get(name, 0) + value

    def record(self, seconds: float) -> dict[str, Any]:
        """Means over what was added; by noise level a list of four, from clean to noise."""
        values: dict[str, Any] = {}
        with np.errstate(invalid="ignore", divide="ignore"):
            for name, (total, rows) in self._sums.items():
                mean = total / rows
                values[name] = mean.tolist() if mean.ndim else float(mean)
        if "fake_error" in values:
            values["fake_over_teacher"] = self._ratio("fake_error", "teacher_error")
        if self.reference is not None and "sample_std" in values:
            values["std_over_teacher"] = values["sample_std"] / self.reference.std
            values["mean_less_teacher"] = (values["sample_mean"] - self.reference.mean) / self.reference.std
        values["images_per_second"] = self._images / seconds if seconds else float("nan")
        self._records += 1
        self._warn(values)
        self._clear()
        return values

    def _ratio(self, above: str, below: str) -> float:
        return float(self._sums[above][0].sum() / max(self._sums[below][0].sum(), 1e-30))

    def note(self, values: dict[str, Any]) -> str:
        if "regression_loss" in values:
            return f"warm start {values['regression_loss']:.4f}"
        gan = f"  D {values['real_right']:.2f}/{values['fake_right']:.2f}" if "real_right" in values else ""
        # Of a step that was skipped nothing is added up.
        fake = f"  fake {values['fake_loss']:.4f}" if "fake_loss" in values else ""
        return f"loss {values['loss']:.4f}{fake}{gan}"

    def _warn(self, values: dict[str, Any]) -> None:
        """One line for every failing sign, and then not for a while."""
        for name, value in values.items():
            value = np.asarray(value, np.float64)
            before = self._smoothed.get(name, value)
            mixed = _SMOOTH * before + (1 - _SMOOTH) * value
            # A level that nobody drew is as it was.
            self._smoothed[name] = np.where(np.isfinite(value), np.where(np.isfinite(before), mixed, value), before)
        for sign, line in failing(self._config, self._smoothed):
            if self._records >= self._told[sign]:
                self._told[sign] = self._records + _SILENCE
                self._say(line)


def failing(config: DistillConfig, values: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, a line with what helps) of every failing sign of a record.

    The bounds are rules of thumb: samples that drift by a tenth, a discriminator that is right in 60 to 80 of 100.
    """
    fake, heads, matching = config.fake, config.discriminator, config.matching
    knob = lambda name, value: f"--{name} ({value:g})"
    guidance = knob("matching.guidance-scale", matching.guidance_scale)
    more_fakes, weight = knob("fake.updates", fake.updates), knob("discriminator.weight", heads.weight)
    head_rate = knob("head-optimizer.learning-rate", config.head_optimizer.learning_rate)
    found = {}
    drift, off = values.get("std_over_teacher", 1.0), values.get("mean_less_teacher", 0.0)
    if drift > 1.1:
        found["std"] = (
            f"samples are over-saturated, their std is {drift:.2f} of the teacher's; lower {guidance} or stop earlier"
        )
    elif drift < 0.9:
        also = f" or {weight}" if config.gan else ""
        found["std"] = f"samples collapse or blur, their std is {drift:.2f} of the teacher's; raise {more_fakes}{also}"
    if abs(off) > 0.1:
        rate = knob("optimizer.learning-rate", config.optimizer.learning_rate)
        found["mean"] = f"samples drift, their mean is {off:+.2f} std off the teacher's; lower {rate}"
    lag = values.get("fake_over_teacher", 1.0)
    if lag > 1.05:
        rate = knob("fake-optimizer.learning-rate", config.fake_optimizer.learning_rate)
        found["fake"] = (
            f"the fake score lags, its error on samples is {lag:.2f} of the teacher's; raise {more_fakes} or {rate}"
        )
    if "real_right" in values:
        right = (values["real_right"] + values["fake_right"]) / 2
        if right > 0.95:
            gamma = knob("discriminator.r1-gamma", heads.r1_gamma)
            found["discriminator"] = (
                f"the discriminator is right on {right:.0%} and teaches little; lower {head_rate} or raise {gamma}"
            )
        elif right < 0.52:
            found["discriminator"] = f"the discriminator is right on {right:.0%}, a guess; raise {head_rate}"
    if (share := _mean(values.get("gan_share"))) > 0.5:
        found["share"] = f"{share:.0%} of the student's gradient is the discriminator's; lower {weight}"
    if (ratio := _mean(values.get("ca_over_dm"))) > 10:
        found["guidance"] = f"guidance outweighs the distribution term {ratio:.0f} times; lower {guidance}"
    return list(found.items())


def _mean(by_level: Any) -> float:
    known = [] if by_level is None else [value for value in np.ravel(by_level) if np.isfinite(value)]
    return float(np.mean(known)) if known else 0.0
