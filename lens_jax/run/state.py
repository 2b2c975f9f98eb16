"""Everything that changes while training, in one tree."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from lens_jax.models import denoiser
from lens_jax.models.denoiser import DenoiserConfig


class State(struct.PyTreeNode):
    """What a step reads and writes, and a checkpoint holds."""

    # Optimiser steps taken, int32 scalar.
    step: jax.Array
    # The denoiser's parameters.
    params: dict
    # Their exponential moving average, in float32: what is sampled and evaluated.
    ema: dict
    opt_state: optax.OptState
    # The codec's parameters; they do not change.
    codec: dict
    # Root of all randomness; step n uses fold_in(key, n), so no key is ever carried.
    key: jax.Array


def create_state(
    config: DenoiserConfig,
    optimizer: optax.GradientTransformation,
    codec: dict,
    params: dict[str, jax.Array] | None = None,
    *,
    seed: int,
) -> State:
    """A state at step 0. Pure, so `jax.eval_shape` of it describes a checkpoint.

    params: by path, those that are not drawn at random.
    """
    key = jax.random.key(seed)
    drawn = flatten_dict(denoiser.init(config, jax.random.fold_in(key, 0)), sep="/")
    params = unflatten_dict(drawn | (params or {}), sep="/")
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(lambda x: x.astype(jnp.float32), params),
        opt_state=optimizer.init(params),
        codec=jax.tree.map(jnp.asarray, codec),
        key=jax.random.fold_in(key, 1),
    )
