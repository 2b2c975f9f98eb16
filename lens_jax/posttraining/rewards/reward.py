"""What a reward is: images and their prompts in, a score each out. A score that is missing is never zero."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from lens_jax.posttraining.prompts.prompt import Prompt


@dataclasses.dataclass(frozen=True)
class Score:
    """What one image got.

    `values[reward.name]` is the reward itself; further ones, `<reward.name>/<what>`, are only logged. A name that is
    not there is missing: the image then has no part in the statistics of its group. A judge that fails must not look
    like one that disliked the image.
    """

    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # Why something is missing, in one line; None where nothing is.
    error: str | None = None

    def __post_init__(self):
        wrong = [f"{name}={value}" for name, value in self.values.items() if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"a score must be finite; what is unknown is left out: {', '.join(wrong)}")


class Reward(Protocol):
    """Something that scores images."""

    # Of the value it gives, in logs and in weights: a word without a slash.
    name: str

    def check(self) -> None:
        """LensError for what every call would fail at: an endpoint that is not there, a package that is missing."""

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> list[Score]:
        """A score an image, in their order. Images are uint8 [H, W, 3], each with its own size; prompts one an image.

        A call holds whole groups, each group's images in a row: what compares the images of a prompt sees them all.
        Called from worker threads, several at a time; it may wait for a server, and then holds no lock. A single image
        that cannot be scored has a Score with an error; LensError means that nothing can be, and ends the run.
        """

    def close(self) -> None:
        """Let go of threads, connections and networks. It is not used again."""
