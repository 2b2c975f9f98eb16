"""Drawing with the denoiser: noise of a seed to latents, on one device or on a mesh with sharded weights.

On a mesh the weights are gathered block by block inside the scan, as in training, so no device ever holds the whole
tree, and the rows are spread over every axis but `tensor`.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lens_jax import parallel
from lens_jax.diffusion import sampler
from lens_jax.diffusion.sampler import Solver, Text
from lens_jax.errors import LensError
from lens_jax.models import denoiser
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.layers import joint_positions

# Mesh axes that rows are spread over. A sampler has many rows, so a sequence need not be sharded.
_ROWS = ("data", "fsdp", "sequence")


def seed_noise(seed: int, count: int, tokens: int, channels: int) -> np.ndarray:
    """The noise [count, tokens, channels] of images 0 .. count - 1 of a seed: each depends on (seed, index) alone."""
    key = seed_key(seed)
    draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), (tokens, channels), jnp.float32)
    return np.asarray(jax.vmap(draw)(jnp.arange(count)))


def seed_key(seed: int) -> jax.Array:
    """The key of a seed of 64 bits. `jax.random.key` takes 32 of them unless x64 is on; below 2^31 this is its key."""
    if isinstance(seed, bool | np.bool_) or not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 64:
        raise LensError(f"seed is {seed!r:.60}; it must be a whole number from 0 to 2^64 - 1")
    halves = np.array(divmod(int(seed), 1 << 32), np.uint32)
    return jax.random.wrap_key_data(halves, impl="threefry2x32")


def chunks(count: int, size: int, mesh: Mesh | None = None) -> Iterator[np.ndarray]:
    """Row numbers in chunks of one size, so that one program serves all; the last chunk repeats its last row.

    On a mesh the size is rounded up to what its rows can be spread over.
    """
    parts = 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in _ROWS]))
    size = -(-min(size, count) // parts) * parts
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1)


def draw(
    model: DenoiserConfig,
    params: dict,
    noise: np.ndarray,
    text: Text,
    negative: Text | None,
    grid: tuple[int, int],
    *,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    solver: Solver = "euler",
    mesh: Mesh | None = None,
    lora: dict | None = None,
) -> jax.Array:
    """Noise [B, N, C] of a grid of (rows, columns) to final latents, in one compiled program.

    Args:
      params: of `models.denoiser`; on a mesh laid out as `parallel.DENOISER_RULES` say, in the memory of the devices.
      noise, text, negative: arrays of the host, the same in every process; B as `chunks` gives it.
      negative: None is no text at all. At a guidance of 1 it is not used.
      lora: an adapter (`models.lora`), on a mesh laid out as `parallel.LORA_RULES` say. One of the same layers and rank
        runs the same program.
    """
    if solver not in sampler.SOLVERS:
        raise LensError(f"solver is {solver!r}; accepted: {', '.join(sampler.SOLVERS)}")
    texts = [text] if negative is None else [text, negative]
    tokens = max(layers[0].shape[1] for layers, _ in texts)
    placed = noise, text, negative if guidance_scale != 1 else None
    return parallel.on(mesh, draw_program)(
        model,
        solver,
        params,
        *(placed if mesh is None else spread(placed, mesh)),
        joint_positions(*grid, tokens),
        sampler.sigma_schedule(grid[0] * grid[1], num_inference_steps),
        np.float32(guidance_scale) if guidance_scale != 1 else None,
        lora,
    )


def denoise_with(model: DenoiserConfig, params: dict, lora: dict | None = None) -> sampler.Denoise:
    """The denoiser for `sampler.sample`, its weights gathered over the mesh that is set, a block at a time."""
    options = {"lora": lora}
    if not jax.sharding.get_abstract_mesh().empty:
        options["gather"] = functools.partial(parallel.gather, dtype=model.dtype)

    def denoise(latents, t, text, positions):
        return denoiser.apply(model, params, latents, *text, t, positions, **options)

    return denoise


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw_program(
    model: DenoiserConfig, solver: Solver, params, noise, text, negative, positions, sigmas, guidance_scale, lora=None
):
    """`sampler.sample` with the denoiser. Positions are an input, so sizes with as many tokens share it."""
    denoise = denoise_with(model, params, lora)
    return sampler.sample(denoise, noise, text, negative, positions, sigmas, guidance_scale, solver)


def spread(tree: Any, mesh: Mesh) -> Any:
    """Arrays of the host by rows over the mesh, whichever rows the devices of this process hold."""
    rows = NamedSharding(mesh, PartitionSpec(tuple(axis for axis in _ROWS if mesh.shape[axis] > 1) or None))

    def place(array) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, rows, lambda index: array[index])

    return jax.tree.map(place, tree)
