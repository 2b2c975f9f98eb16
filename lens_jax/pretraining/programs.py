"""The functions that a run compiles: what `loop.py` calls and `lens-jax plan` lowers for devices that are not there."""

import functools
from typing import Any, NamedTuple

import jax
import optax

from lens_jax.pretraining.config import TrainConfig
from lens_jax.run import step
from lens_jax.run.step import StepConfig


class Programs(NamedTuple):
    """Jitted, the state or the sums that they change donated. On a mesh they are called, traced and lowered with it."""

    # (state, batch) -> (state, metrics): an update from one batch.
    train_step: Any
    # With several micro-steps an update: (params) -> sums of nothing; (state, sums, batch, micro) -> sums, compiled
    # once an area; (state, sums) -> (state, metrics).
    empty_totals: Any
    micro_step: Any
    update: Any
    # (params, batch, key) -> (weighted sum of losses, sum of weights).
    validation_loss: Any


def step_config(config: TrainConfig) -> StepConfig:
    """What the step depends on, of everything in a run."""
    skip = config.nonfinite == "skip"
    return StepConfig(
        config.model, config.flow, config.ema_decay, skip, config.weighting, config.offload, config.mesh.reduce_dtype
    )


def make_programs(config: TrainConfig, optimizer: optax.GradientTransformation) -> Programs:
    """The programs of a run; nothing is traced yet."""
    static = step_config(config)
    return Programs(
        train_step=jax.jit(functools.partial(step.train_step, static, optimizer), donate_argnums=0),
        empty_totals=jax.jit(functools.partial(step.empty_totals, micro_steps=config.accumulation)),
        micro_step=jax.jit(functools.partial(step.micro_step, static), donate_argnums=1),
        update=jax.jit(functools.partial(step.update, static, optimizer), donate_argnums=0),
        validation_loss=jax.jit(functools.partial(step.validation_loss, static)),
    )
