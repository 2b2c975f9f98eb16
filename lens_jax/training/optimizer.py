"""AdamW as in the report: clipped, warmed up, decayed on matrices only."""

import dataclasses
from typing import Literal

import jax
import optax

from lens_jax.errors import LensError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. The report gives the rate, the betas and the clip; the rest are usual values."""

    # Peak learning rate: 2e-4 in the report's first stage, 1e-4 in its second.
    learning_rate: float = 2e-4
    # Steps of linear warm-up.
    warmup_steps: int = 1000
    # What follows the warm-up: the report's constant rate, or a cosine down to zero at the last step.
    schedule: Literal["constant", "cosine"] = "constant"
    # Adam's decay of the first moment.
    beta1: float = 0.9
    # Adam's decay of the second moment.
    beta2: float = 0.999
    # Added to the root of the second moment.
    eps: float = 1e-8
    # Decoupled weight decay of matrices; norms and biases are never decayed.
    weight_decay: float = 0.01
    # Gradients longer than this are scaled down to it.
    clip_norm: float = 1.0

    def __post_init__(self):
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise LensError("optimizer.learning_rate and optimizer.clip_norm must be positive")
        if self.warmup_steps < 0:
            raise LensError(f"optimizer.warmup_steps is {self.warmup_steps}; it must be 0 or more")


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step; the first update already moves, at 1 / (warmup_steps + 1) of the peak."""
    warmup = optax.linear_schedule(config.learning_rate / (config.warmup_steps + 1), config.learning_rate,
                                   config.warmup_steps)  # fmt: skip
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(1, steps - config.warmup_steps))
    else:
        after = optax.constant_schedule(config.learning_rate)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def decay_mask(params: dict) -> dict:
    """True for the leaves that weight decay applies to.

    By path, not by rank: stacking the blocks turns a bias into a matrix, which a rank rule would decay.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update rule for a run of `steps` optimiser steps."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
