"""How far images in one dtype are from those in float32: by stages that are given the same, and from end to end."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lens_jax.diffusion import sampler
from lens_jax.encoders.text import TextFeatures
from lens_jax.inference.pipeline import LensPipeline
from lens_jax.models import denoiser
from lens_jax.models.layers import joint_positions

# Levels of a byte by which an image may be off before it is counted.
LEVELS = (1, 2, 4)


def distances(
    pipe: LensPipeline,
    reference: LensPipeline,
    encode: Callable[[LensPipeline], TextFeatures],
    noise: np.ndarray,
    grid: tuple[int, int],
    num_inference_steps: int,
    guidance_scale: float,
) -> dict[str, float | str]:
    """Relative distances |a - b| / |b| of what `pipe` computes (a) from what `reference` does (b).

    `text` is a number for each feature layer, and `text_median_token` the median over its tokens: a rounding now and
    then sends a token to another expert, which changes that token altogether and the others hardly. `velocity` is the
    largest over the noise levels of the schedule, on the straight line from the noise [B, N, C] to the reference's
    final latents, and `decode` that of images in [0, 1] from these latents: both stages are given the same.
    `latents` and `image` come out of the whole, from the prompt on, and so does `off_by_more_than_n`, the share of
    bytes of the uint8 image that are more than n levels off.
    """
    text, expected_text = encode(pipe), encode(reference)
    steps = num_inference_steps, guidance_scale
    latents = pipe.denoise(noise, text, None, grid, *steps)
    expected = reference.denoise(noise, expected_text, None, grid, *steps)
    clean, noise = np.asarray(expected, np.float32), np.asarray(noise, np.float32)

    def velocity_distance(sigma):
        between = sigma * noise + (1 - sigma) * clean
        return relative_distance(*(_velocity(p, between, expected_text, grid, sigma) for p in (pipe, reference)))

    images = [p.decode(x, grid, "pil").astype(int) for p, x in ((pipe, latents), (reference, expected))]
    off = np.abs(images[0] - images[1])
    layers = [
        (_valid(layer, text.lengths), _valid(other, text.lengths))
        for layer, other in zip(text.layers, expected_text.layers)
    ]
    medians = [np.median([relative_distance(*tokens) for tokens in zip(*pair)]) for pair in layers]
    listed = lambda values: ", ".join(f"{value:.2g}" for value in values)
    decode = lambda p, x: p.decode(x, grid, "np")
    return {
        "text": listed(relative_distance(*pair) for pair in layers),
        "text_median_token": listed(medians),
        "velocity": max(map(velocity_distance, sampler.sigma_schedule(grid[0] * grid[1], num_inference_steps)[:-1])),
        "decode": relative_distance(decode(pipe, expected), decode(reference, expected)),
        "latents": relative_distance(latents, expected),
        "image": relative_distance(decode(pipe, latents), decode(reference, expected)),
        **{f"off_by_more_than_{level}": float((off > level).mean()) for level in LEVELS},
    }


def relative_distance(actual, expected) -> float:
    """|actual - expected| / |expected| over all elements."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def _velocity(pipe: LensPipeline, latents: np.ndarray, text: TextFeatures, grid: tuple[int, int], sigma: float):
    """The conditional velocity [B, N, C] of a pipeline at one noise level."""
    positions = joint_positions(*grid, text.layers[0].shape[1])
    t = jnp.full(len(latents), sigma, jnp.float32)
    apply = jax.jit(denoiser.apply, static_argnums=0)
    return apply(pipe.model, pipe.params, latents, tuple(text.layers), text.lengths, t, positions)


def _valid(layer, lengths: np.ndarray) -> np.ndarray:
    """The tokens of [B, T, width] that are no padding, one after another."""
    return np.concatenate([np.asarray(row, np.float64)[:length] for row, length in zip(layer, lengths)])
