"""Everything that a run changes or reads while it trains, as named trees."""

from typing import Any

import jax
import optax
from flax import struct

# A nested dict of arrays. The first key names a network ("denoiser", "lora", "student"), and with it the sharding
# rules of what is below (`Job.rules`).
Tree = dict[str, Any]
# What a checkpoint keeps of a state apart, so that sampling reads the average without the optimiser.
PARTS = ("params", "frozen", "ema", "opt_state", "extra")


class State(struct.PyTreeNode):
    """What a step reads and writes.

    Pre-training has params {"denoiser"} and frozen {"codec"}; RL would have params {"lora"}, frozen {"denoiser"}, extra
    {"old"}; distillation params {"denoiser", "fake", "head"}, of which the first is the student, frozen {"teacher"}.
    """

    # Optimiser steps taken, int32 scalar.
    step: jax.Array
    # What is trained, in float32.
    params: Tree
    # What the loss reads and no step changes.
    frozen: Tree
    # Exponential moving average of `params`, in float32; None where a job keeps none.
    ema: Tree | None
    opt_state: optax.OptState
    # Whatever else an algorithm carries from step to step.
    extra: Tree
    # Root of all randomness; step n uses fold_in(key, n), so no key is ever carried.
    key: jax.Array


def to_parts(state: State, unsaved: tuple[str, ...] = ()) -> dict[str, Any]:
    """A state as a checkpoint keeps it: `PARTS` that are not empty, but for those `unsaved`, and `progress`."""
    kept = {name: getattr(state, name) for name in PARTS if name not in unsaved}
    # Orbax takes no empty tree.
    kept = {name: tree for name, tree in kept.items() if jax.tree.leaves(tree)}
    return {**kept, "progress": {"step": state.step, "key": state.key}}


def from_parts(parts: dict[str, Any], like: State) -> State:
    """The state that `to_parts` took apart. What it left out is as in `like`."""
    progress = parts["progress"]
    return like.replace(**{name: parts[name] for name in PARTS if name in parts}, **progress)
