"""One optimiser step of any loss: pure functions of state and batch, and the programs that a run compiles of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lens_jax import parallel
from lens_jax.run.state import State, Tree

# A dict of arrays with the rows of one bucket.
Batch = dict[str, Any]
# (params, frozen, batch, key) -> the loss, float32 scalar, and sums over the batch's rows to log, arrays by name.
# `frozen` is what it reads of a state and is not trained: the trees `frozen` and `extra` of it.
Loss = Callable[[Tree, Tree, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How updates are made of losses; hashable, so that it can be a static argument."""

    # Decay of the moving average of the parameters; None where there is none.
    ema_decay: float | None
    # Leave the state as it was when the loss or a gradient is not finite.
    skip_nonfinite: bool = False
    # Micro-steps summed into one update.
    accumulation: int = 1
    # What a micro-step's batch counts in an update; None lets all count alike.
    weigh: Callable[[Batch], float] | None = None
    # Average and moments are in the memory of the host, and come to the devices for the update alone.
    offload: bool = False


class Totals(struct.PyTreeNode):
    """Sums over the micro-steps of one update."""

    # Gradients times weights, in float32, laid out like the parameters.
    gradients: Tree
    # Losses times weights.
    loss: jax.Array
    weight: jax.Array
    # Loss of each micro-step.
    losses: jax.Array
    # What the loss gives to log.
    sums: dict[str, jax.Array]


def empty_totals(config: StepConfig, loss: Loss, state: State, batch: Batch) -> Totals:
    """The sums before the first micro-step of a run, whatever its batch's shape; after that an update empties them."""
    shapes = jax.eval_shape(functools.partial(micro_step, config, loss), state, None, batch, 0)
    zeros = lambda like: jnp.zeros(like.shape, like.dtype)
    gradients = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), state.params)
    return Totals(
        gradients=gradients,
        loss=jnp.zeros(()),
        weight=jnp.zeros(()),
        losses=jnp.zeros(config.accumulation),
        sums=jax.tree.map(zeros, shapes.sums),
    )


def micro_step(
    config: StepConfig, loss: Loss, state: State, totals: Totals | None, batch: Batch, micro: int | jax.Array
) -> Totals:
    """Add the gradients of one batch to `totals`; None starts anew.

    `micro` counts the batches of an update, for the randomness. Batches whose arrays have the same shapes share one
    compiled program.
    """
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), micro)
    frozen = {**state.frozen, **state.extra}
    (value, sums), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, batch, key)
    weight = jnp.float32(config.weigh(batch) if config.weigh else 1)
    gradients = jax.tree.map(lambda g: weight * g.astype(jnp.float32), gradients)
    count = 1 if totals is None else config.accumulation
    losses = jnp.where(jnp.arange(count) == micro, value, 0)
    new = Totals(gradients=gradients, loss=weight * value, weight=weight, losses=losses, sums=sums)
    return new if totals is None else jax.tree.map(jnp.add, totals, new)


def update(
    config: StepConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    state: State,
    totals: Totals,
) -> tuple[State, Totals, dict[str, jax.Array]]:
    """The next state, emptied totals in the memory of the old ones, and what to log: float32 scalars and arrays."""
    if config.offload:
        state = parallel.move_offloaded(state, jax.memory.Space.Device)
    loss = totals.loss / totals.weight
    gradients = jax.tree.map(lambda g: g / totals.weight, totals.gradients)
    gradient_norm = optax.tree.norm(gradients)
    # By the step and not by the updates taken, so that the rate follows the schedule past skipped ones.
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, step=state.step)
    params = optax.apply_updates(state.params, updates)
    updated = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    if config.ema_decay is not None:
        # Early on the average would be mostly the initial parameters, so its decay grows to the configured one.
        decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
        updated = updated.replace(ema=jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params))
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    if config.skip_nonfinite:
        unchanged = state.replace(step=state.step + 1)
        updated = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, unchanged)
    if config.offload:
        updated = parallel.move_offloaded(updated, jax.memory.Space.Host)
    metrics = {
        "loss": loss,
        "losses": totals.losses,
        "gradient_norm": gradient_norm,
        "update_norm": optax.tree.norm(updates),
        "parameter_norm": optax.tree.norm(params),
        "learning_rate": schedule(state.step),
        "finite": finite,
        **totals.sums,
    }
    return updated, jax.tree.map(jnp.zeros_like, totals), metrics


def train_step(
    config: StepConfig,
    loss: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    state: State,
    batch: Batch,
) -> tuple[State, dict[str, jax.Array]]:
    """An update from one batch, in one program without sums in between."""
    state, _, metrics = update(config, optimizer, schedule, state, micro_step(config, loss, state, None, batch, 0))
    return state, metrics


class Programs(NamedTuple):
    """Jitted, what they change donated. On a mesh they are called, traced and lowered with it."""

    # (state, batch) -> (state, metrics): an update from one batch.
    train_step: Any
    # With several micro-steps an update: (state, batch) -> sums of nothing, once a run; (state, sums, batch, micro) ->
    # sums, compiled once a shape of batches; (state, sums) -> (state, empty sums, metrics).
    empty_totals: Any
    micro_step: Any
    update: Any


def make_programs(
    config: StepConfig, loss: Loss, optimizer: optax.GradientTransformationExtraArgs, schedule: optax.Schedule
) -> Programs:
    """The programs of a run; nothing is traced yet."""
    return jitted(
        functools.partial(train_step, config, loss, optimizer, schedule),
        functools.partial(empty_totals, config, loss),
        functools.partial(micro_step, config, loss),
        functools.partial(update, config, optimizer, schedule),
    )


def jitted(train_step: Callable, empty_totals: Callable, micro_step: Callable, update: Callable) -> Programs:
    """Functions as programs; nothing is traced yet. Where a job has several kinds of updates, they may take more."""
    return Programs(
        train_step=jax.jit(train_step, donate_argnums=0),
        empty_totals=jax.jit(empty_totals),
        micro_step=jax.jit(micro_step, donate_argnums=1),
        update=jax.jit(update, donate_argnums=(0, 1)),
    )
