"""Drawing the images of an epoch with the old policy, on one device or on a mesh, a batch at a time.

An image is a function of (seed, epoch, prompt, member) and the policy: its noise depends on nothing else, and rows of a
batch do not see each other. Steps are taken by the same network code, weights and layout as in the update.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lens_jax import parallel
from lens_jax.data.buckets import Bucket
from lens_jax.diffusion import sampler, sde
from lens_jax.diffusion.sampler import Solver
from lens_jax.encoders.images import ImageCodec, decode_rows
from lens_jax.encoders.text import TextFeatures
from lens_jax.models.latent_grid import latent_grid
from lens_jax.models.layers import joint_positions
from lens_jax.posttraining.policy import Policy
from lens_jax.run.state import Tree
from lens_jax.run.step import Batch

# A name of the sampler that paths are drawn with, beside the solvers.
SDE = "sde"


class Sizes(NamedTuple):
    """The sizes that are drawn, and how long the rows of a batch are."""

    buckets: tuple[Bucket, ...]
    # (rows, columns) of latent tokens of each.
    grids: tuple[tuple[int, int], ...]
    # Image tokens with their padding, and room for text: the same for all, so that one program serves them.
    padded: int
    text: int

    def tokens(self, size: int) -> int:
        return self.grids[size][0] * self.grids[size][1]


def make_sizes(codec: ImageCodec, buckets: Sequence[Bucket], text: int, joint_multiple: int) -> Sizes:
    """LensError for a size that the codec cannot tile. `text` is the longest prompt."""
    grids = tuple(latent_grid(codec, bucket.height, bucket.width) for bucket in buckets)
    padded = max(rows * columns for rows, columns in grids)
    return Sizes(tuple(buckets), grids, padded, text + -(padded + text) % joint_multiple)


def positions(sizes: Sizes, size: int) -> np.ndarray:
    """int32 [padded + text, 3]."""
    joint, tokens = joint_positions(*sizes.grids[size], sizes.text), sizes.tokens(size)
    return np.insert(joint, [tokens] * (sizes.padded - tokens), 0, axis=0)


def conditions(sizes: Sizes, size: int, features: TextFeatures, rows: np.ndarray, mesh: Mesh | None) -> Batch:
    """What a network reads besides latents, for these rows of `features`: `text`, `text_lengths`, `positions`.

    And `n_image`, where sizes differ in their tokens. Features have `sizes.text` tokens; `rows` are those of the whole
    batch, the same in every process.
    """
    mine = rows[parallel.rows_of_host(mesh, len(rows))]
    batch = {
        "text": tuple(layer[mine] for layer in features.layers),
        "text_lengths": features.lengths[mine],
        "positions": positions(sizes, size),
    }
    if any(sizes.tokens(i) != sizes.padded for i in range(len(sizes.grids))):
        batch["n_image"] = np.int32(sizes.tokens(size))
    return parallel.place_batch(batch, mesh)


@jax.jit
def row_keys(seed_key: jax.Array, epoch: jax.Array, prompts: jax.Array, members: jax.Array) -> jax.Array:
    """uint32 [B, 2], a key for the noise of each image: of (seed, epoch, prompt, member)."""
    base = jax.random.fold_in(seed_key, epoch)
    one = lambda prompt, member: jax.random.key_data(jax.random.fold_in(jax.random.fold_in(base, prompt), member))
    return jax.vmap(one)(prompts, members)


def row_noise(keys: jax.Array, number: jax.Array | int, tokens: int, channels: int) -> jax.Array:
    """Standard normal noise [B, tokens, channels], the `number`-th of each row's key; padding does not change it."""

    def draw(keys, number):
        def one(key):
            key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), number)
            return jax.random.normal(key, (tokens, channels), jnp.float32)

        return jax.vmap(one)(keys)

    if jax.sharding.get_abstract_mesh().empty:
        return draw(keys, number)
    rows = PartitionSpec(jax.typeof(keys).sharding.spec[0])
    # The number is a tracer within a scan, and shard_map closes over none.
    mapped = jax.shard_map(draw, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False)
    return mapped(keys, jnp.asarray(number, jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def rollout_program(
    policy: Policy,
    solver: Solver | str,
    fixed: Tree,
    tree: dict | None,
    batch: Batch,
    sigmas: jax.Array,
    levels: jax.Array | None,
    guidance_scale: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """Final latents float32 [B, N, C] alone; of the solver `SDE` all of the path, from the noise on, steps + 1 of them.

    Args:
      fixed, tree: a state's `frozen` and `extra`, and the policy that draws.
      batch: that of `conditions`, and `keys` [B, 2].
      levels: for `SDE`, the noise of each step.
    """
    keys, channels = batch["keys"], policy.model.latent_channels
    tokens = batch["positions"].shape[0] - batch["text"][0].shape[1]
    velocity = policy.velocity(fixed, tree, batch, guidance_scale)
    latents = row_noise(keys, 0, tokens, channels)
    if solver == SDE:
        draw = lambda step: row_noise(keys, step + 1, tokens, channels)
        return tuple(sde.sample(velocity, latents, sigmas, levels, draw))
    return (sampler.SOLVERS[solver](velocity, latents, sigmas)[0],)


@functools.partial(jax.jit, static_argnums=(0, 1))
def decode_program(
    codec: ImageCodec, grid: tuple[int, int], params: dict, latents: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(images uint8 [B, H, W, 3], which are finite [B]) of padded latents, on every device."""
    return decode_rows(codec, "pil", grid, params, latents[:, : grid[0] * grid[1]])


def to_host(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays in the memory of the hosts, each part where its device is; `parallel.on_device` brings them back."""
    return parallel.on(mesh, _to_host)(tree)


@jax.jit
def _to_host(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)
