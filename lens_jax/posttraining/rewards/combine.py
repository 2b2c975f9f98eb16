"""Several rewards as one: each scored in threads of its own while images are drawn, then weighted."""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Sequence

import numpy as np

from lens_jax.errors import LensError
from lens_jax.posttraining.prompts.prompt import Prompt
from lens_jax.posttraining.rewards.function import Function
from lens_jax.posttraining.rewards.ocr import Ocr
from lens_jax.posttraining.rewards.reward import Reward, Score
from lens_jax.posttraining.rewards.rubric import RubricJudge
from lens_jax.posttraining.rewards.scene import SceneChecker, SceneOpinion
from lens_jax.posttraining.rewards.service import Service

# The kinds of rewards. A new one is a file beside this and its name here.
Kind = RubricJudge | Ocr | SceneChecker | SceneOpinion | Service | Function

# What is learnt from, among the values of a combined score.
TOTAL = "reward"


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A reward that is learnt from."""

    reward: Kind
    # Its share: the reward of an image is the mean of its rewards, so weighted.
    weight: float = 1.0

    def __post_init__(self):
        if self.weight <= 0:
            raise LensError(f"rewards: the weight of {self.reward.name!r} is {self.weight}; it must be above 0")


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """What images are worth."""

    # Rewards that are learnt from.
    train: tuple[Weighted, ...] = ()
    # Rewards that are only measured, on held-out prompts, and never learnt from: what shows whether a rising reward
    # means better images.
    evaluation: tuple[Kind, ...] = ()
    # Share of an epoch's images that may end without a reward; when more do, the run stops.
    max_failed: float = 0.1
    # Groups that are scored at the same time: the calls of one end when its slowest answer comes, and those of another
    # fill the gap.
    groups_at_once: int = 4

    def __post_init__(self):
        if not 0 <= self.max_failed <= 1:
            raise LensError(f"rewards.max_failed is {self.max_failed}; it is a share, from 0 to 1")
        if self.groups_at_once < 1:
            raise LensError(f"rewards.groups_at_once is {self.groups_at_once}; it must be at least 1")
        names = [weighted.reward.name for weighted in self.train] + [kind.name for kind in self.evaluation]
        for name in names:
            if not name or "/" in name or name == TOTAL:
                raise LensError(
                    f"rewards: name {name!r} cannot be used; expected a word without a slash, not {TOTAL!r}"
                )
            if names.count(name) > 1:
                raise LensError(f"rewards: two have the name {name!r}; give each its own")


class Judging:
    """Scores groups of images while others are drawn.

    `submit` returns at once; `result()` of what it returns waits. LensError there ends the run.
    """

    def __init__(
        self, train: Sequence[tuple[Reward, float]], evaluation: Sequence[Reward], max_failed: float, at_once: int
    ):
        self._weights = {reward.name: weight for reward, weight in train}
        self._train = [reward for reward, _ in train]
        self._evaluation = list(evaluation)
        self._max_failed = max_failed
        # One pool a reward: the one that takes long must not keep the others waiting.
        pool = lambda reward: concurrent.futures.ThreadPoolExecutor(at_once, f"reward-{reward.name}")
        self._pools = {reward.name: pool(reward) for reward in (*self._train, *self._evaluation)}
        self.start_epoch(0)

    @classmethod
    def load(cls, config: RewardsConfig) -> "Judging":
        """The rewards of a config. LensError for a reward that cannot be had."""
        if not config.train and not config.evaluation:
            raise LensError("rewards: none given; rewards.train needs at least one")
        train = [(weighted.reward.load(), weighted.weight) for weighted in config.train]
        evaluation = [kind.load() for kind in config.evaluation]
        return cls(train, evaluation, config.max_failed, config.groups_at_once)

    def check(self) -> None:
        """LensError for a reward that every call would fail at."""
        for reward in (*self._train, *self._evaluation):
            reward.check()

    def start_epoch(self, images: int) -> None:
        """From here on the share of images without a reward is counted, of so many; 0 counts none."""
        self._expected, self._failed = images, 0
        self._reasons: collections.Counter[str] = collections.Counter()

    @property
    def failed(self) -> int:
        """Images of this epoch without a reward."""
        return self._failed

    def counts(self) -> dict[str, float]:
        """What the rewards asked and spent so far, by `<reward>/<what>`, of those that count."""
        found = {}
        for reward in (*self._train, *self._evaluation):
            counts = getattr(reward, "counts", None)
            found |= {f"{reward.name}/{what}": value for what, value in (counts() if counts else {}).items()}
        return found

    def submit(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt], held_out: bool = False) -> "Pending":
        """Begin to score whole groups of uint8 images [H, W, 3]; with `held_out` by the evaluation's rewards too."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts")
        rewards = [*self._train, *(self._evaluation if held_out else ())]
        futures = {r.name: self._pools[r.name].submit(r.score, images, prompts) for r in rewards}
        return Pending(self, futures, len(images))

    def close(self) -> None:
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for reward in (*self._train, *self._evaluation):
            reward.close()

    def _combine(self, scores: Sequence[dict[str, Score]]) -> list[Score]:
        combined = [combine(score, self._weights) for score in scores]
        for score in combined if self._expected else ():
            if TOTAL not in score.values:
                self._failed += 1
                self._reasons[score.error or "no reward"] += 1
        if self._failed > self._max_failed * self._expected:
            reason, times = self._reasons.most_common(1)[0]
            raise LensError(
                f"rewards: {self._failed} of the {self._expected} images of this epoch have none, more than "
                f"rewards.max_failed={self._max_failed:g} allows; {times} of them: {reason}"
            )
        return combined


class Pending:
    """Scores to come."""

    def __init__(self, judging: Judging, futures: dict[str, concurrent.futures.Future], count: int):
        self._judging, self._futures, self._count = judging, futures, count
        self._scores: list[Score] | None = None

    def done(self) -> bool:
        return all(future.done() for future in self._futures.values())

    def result(self) -> list[Score]:
        """A score an image. Its `reward` is what is learnt from; values of the single rewards lie beside it."""
        if self._scores is None:
            found = {name: future.result() for name, future in self._futures.items()}
            self._scores = self._judging._combine(
                [{name: scores[i] for name, scores in found.items()} for i in range(self._count)]
            )
            self._futures = {}
        return self._scores


def combine(scores: dict[str, Score], weights: dict[str, float]) -> Score:
    """The scores of one image by reward as one: `reward` is the weighted mean of those that have a weight.

    A reward that has nothing to say to a prompt (no value, no error) is left out of the mean, for all images of the
    prompt alike. One that failed leaves the image without a reward: a mean over what is left would be another reward
    than that of the other images of its group.
    """
    values = {key: value for score in scores.values() for key, value in score.values.items()}
    errors = [f"{name}: {score.error}" for name, score in scores.items() if score.error]
    wanted = [name for name in weights if name in scores and (name in scores[name].values or scores[name].error)]
    if wanted and all(name in values for name in wanted):
        total = sum(weights[name] for name in wanted)
        values[TOTAL] = sum(weights[name] * values[name] for name in wanted) / total
    elif weights and not wanted:
        errors.append("no reward has anything to say to this prompt")
    return Score(values, "; ".join(errors) or None)
