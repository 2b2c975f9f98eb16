"""AdamW as in the report: clipped, warmed up, decayed on matrices only."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
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
    # Adam's decay of the first moment. With 0 there is none, in memory either.
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
        if not (self.learning_rate > 0 and self.clip_norm > 0):
            raise LensError("optimizer.learning_rate and optimizer.clip_norm must be positive")
        if not 0 <= self.warmup_steps < 1 << 31:
            raise LensError(f"optimizer.warmup_steps is {self.warmup_steps}; it must be 0 or more, and below 2^31")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise LensError(f"optimizer.{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if not self.eps > 0 or not self.weight_decay >= 0:
            raise LensError("optimizer.eps must be positive, and optimizer.weight_decay 0 or more")


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

    By path, not by rank: stacking the blocks turns a bias into a matrix, which a rank rule would decay. The two factors
    of an adapter, `a` and `b`, are matrices.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "a", "b"), params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """The update rule for a run of `steps` optimiser steps; its `update` needs the step, from 0, as `step=`."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    adamw = optax.chain(
        adam if config.beta1 else _scale_by_second_moment(config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        _learn(learning_rate_schedule(config, steps)),
    )
    return optax.chain(_clip(config.clip_norm), adamw)


class SecondMoment(NamedTuple):
    """What Adam keeps where its first moment is the gradient itself."""

    # Updates taken, int32 scalar.
    count: jax.Array
    # Moving average of squared gradients, laid out like the parameters.
    nu: dict


def _scale_by_second_moment(beta2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with a first decay of 0, which would keep the last gradient for nothing."""

    def init(params):
        return SecondMoment(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(gradients, state, params=None):
        count = state.count + 1
        nu = jax.tree.map(lambda n, g: beta2 * n + (1 - beta2) * jnp.square(g), state.nu, gradients)
        unbiased = 1 - beta2 ** count.astype(jnp.float32)
        scaled = jax.tree.map(lambda g, n: g / (jnp.sqrt(n / unbiased) + eps), gradients, nu)
        return scaled, SecondMoment(count, nu)

    return optax.GradientTransformation(init, update)


def each(optimizers: dict[str, optax.GradientTransformationExtraArgs]) -> optax.GradientTransformationExtraArgs:
    """An update rule of its own for each tree of the parameters, by name; the state is a tuple in the order of names.

    A dict would put a name of its own before that of the tree, by which a state is laid out.
    """
    names = sorted(optimizers)
    one = lambda tree, name: {name: tree[name]}

    def init(params):
        return tuple(optimizers[name].init(one(params, name)) for name in names)

    def update(gradients, state, params=None, **extra):
        updates, states = {}, []
        for name, own in zip(names, state):
            made, own = optimizers[name].update(one(gradients, name), own, one(params, name), **extra)
            updates |= made
            states.append(own)
        return updates, tuple(states)

    return optax.GradientTransformationExtraArgs(init, update)


def _clip(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with one factor: its division of every gradient is written to memory on a CPU."""

    def clip(gradients, state, params=None):
        factor = jnp.minimum(1, max_norm / optax.tree.norm(gradients))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), clip)


def _learn(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate` by the run's own step, so that a skipped update does not delay the schedule.

    The last operation is a division.

    Updates are read twice, by the parameters and by the norm in the record. XLA computes what ends in a product anew
    for each of them, so on a CPU both read the old parameters, which are copied first; what ends in a division it
    computes once in the quickstart's program (in some small ones it does not). With `_clip`, its update takes 0.72 of
    the time (docs/benchmarks.md).
    """

    def learn(updates, state, params=None, *, step, **extra):
        inverse = -1 / schedule(step)
        return jax.tree.map(lambda u: u / jnp.asarray(inverse, u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), learn)
