"""The discriminator: heads on image tokens of the frozen teacher, laid out as the grid they come from.

A head is a 3 x 3 convolution to a few channels, a group norm, an activation and a number for each token, of which the
mean is the logit; of several heads their mean. 0.44 million parameters for the released width. The neighbours of every
token are an input, so one head and one program serve all buckets of as many tokens, with or without padding.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lens_jax.models.layers import layout
from lens_jax.posttraining.distill_config import DiscriminatorConfig, DistillConfig

# Of a 3 x 3 window, row by row; that of the opposite place is 8 less it.
WINDOW = 9


def neighbours(grid: tuple[int, int], padded: int) -> np.ndarray:
    """int32 [padded, WINDOW]: the tokens around every token of a grid (rows, columns), `padded` where there is none."""
    rows, columns = grid
    number = np.full((rows + 2, columns + 2), padded, np.int32)
    number[1:-1, 1:-1] = np.arange(rows * columns).reshape(grid)
    windows = [number[r : r + rows, c : c + columns].ravel() for r in range(3) for c in range(3)]
    found = np.full((padded, WINDOW), padded, np.int32)
    found[: rows * columns] = np.stack(windows, axis=1)
    return found


def init(config: DistillConfig, key: jax.Array) -> dict:
    """Fresh heads, float32: `after_24/conv/kernel` [WINDOW, model width, width] and so on."""
    wide, narrow = config.model.width, config.discriminator.width
    heads = {}
    for block in config.blocks:
        first, second = jax.random.split(jax.random.fold_in(key, block))
        heads[f"after_{block}"] = {
            "conv": {
                "kernel": jax.random.normal(first, (WINDOW, wide, narrow)) * (WINDOW * wide) ** -0.5,
                "bias": jnp.zeros(narrow),
            },
            "norm": {"scale": jnp.ones(narrow), "bias": jnp.zeros(narrow)},
            "out": {"kernel": jax.random.normal(second, (narrow,)) * narrow**-0.5, "bias": jnp.zeros(())},
        }
    return heads


def logits(
    config: DiscriminatorConfig,
    heads: dict,
    features: tuple[jax.Array, ...],
    neighbours: jax.Array,
    n_image: jax.Array | None = None,
) -> jax.Array:
    """How real noised latents look, float32 [B], by the teacher's image tokens [B, N, width] after each block.

    Args:
      features: in the order of the heads' blocks.
      neighbours: of `neighbours`.
      n_image: tokens that are no padding; None is all.
    """
    ordered = sorted(heads, key=lambda name: int(name.removeprefix("after_")))
    parts = [_head(config, heads[name], x, neighbours, n_image) for name, x in zip(ordered, features, strict=True)]
    return sum(parts) / len(parts)


def _head(config: DiscriminatorConfig, head: dict, x: jax.Array, neighbours, n_image) -> jax.Array:
    # Projected before the neighbours are collected: 48 times less to move.
    kernel = head["conv"]["kernel"].astype(x.dtype)
    projected = jnp.einsum("bnc,kcd->bnkd", x, kernel, preferred_element_type=jnp.float32)
    y = _collect(projected, neighbours) + head["conv"]["bias"]
    y = jax.nn.silu(_group_norm(y, config.groups, head["norm"], n_image))
    return _mean_of_tokens(jnp.sum(y * head["out"]["kernel"], -1), n_image) + head["out"]["bias"]


def _group_norm(y: jax.Array, groups: int, norm: dict, n_image) -> jax.Array:
    """y [B, N, width] with the mean 0 and the variance 1 of each group of channels of a sample, scaled and shifted."""
    parts = y.reshape(*y.shape[:2], groups, -1)
    mean = _mean_of_tokens(parts.mean(-1), n_image)[:, None, :, None]
    variance = _mean_of_tokens(jnp.square(parts - mean).mean(-1), n_image)[:, None, :, None]
    normed = (parts - mean) * jax.lax.rsqrt(variance + 1e-5)
    return normed.reshape(y.shape) * norm["scale"] + norm["bias"]


def _mean_of_tokens(x: jax.Array, n_image) -> jax.Array:
    """Mean over axis 1 of what is no padding."""
    if n_image is None:
        return jnp.mean(x, axis=1)
    valid = jnp.expand_dims(jnp.arange(x.shape[1]) < n_image, range(1, x.ndim - 1))
    return jnp.sum(jnp.where(valid, x, 0), axis=1) / n_image


@jax.custom_vjp
def _collect(projected: jax.Array, neighbours: jax.Array) -> jax.Array:
    """Each token's sum over its window: [B, N, WINDOW, width] -> [B, N, width].

    Its gradient is collected from the opposite places, where autodiff would scatter: in another order each time on a
    GPU, and without a rule for sharded rows.
    """
    return _on_rows(_gather_sum, projected, neighbours)


def _collect_forward(projected, neighbours):
    return _collect(projected, neighbours), neighbours


def _collect_backward(neighbours, gradient):
    return _on_rows(_gather_opposite, gradient, neighbours), None


_collect.defvjp(_collect_forward, _collect_backward)


def _take(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """x [B, N, width] at some tokens, zero where there is none."""
    return jnp.take(x, tokens, axis=1, mode="fill", fill_value=0)


def _gather_sum(projected, neighbours):
    return sum(_take(projected[:, :, place], neighbours[:, place]) for place in range(WINDOW))


def _gather_opposite(gradient, neighbours):
    return jnp.stack([_take(gradient, neighbours[:, WINDOW - 1 - place]) for place in range(WINDOW)], axis=2)


def _on_rows(function, x: jax.Array, neighbours: jax.Array) -> jax.Array:
    """On a mesh each device with its own rows of x, since gathering has no rule there."""
    place = layout(x)
    if place is None:
        return function(x, neighbours)
    rows = PartitionSpec(place.spec[0])
    mapped = jax.shard_map(function, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False)
    return mapped(x, neighbours)
