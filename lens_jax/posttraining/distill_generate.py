"""The student's samples in training: backward simulation on the noise levels that it will be deployed with.

The steps before the trained one are taken without a gradient, by one loop of as many turns as the batch needs: one copy
of the network in the program, and 1.5 passes on average where a batch shares its step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lens_jax.diffusion import flow
from lens_jax.diffusion.sampler import Velocity, level_of_rows
from lens_jax.posttraining.distill_config import GeneratorConfig


class Input(NamedTuple):
    """What the student's trained step reads."""

    # [B, N, C].
    latents: jax.Array
    # Noise level of each row, float32 [B].
    sigma: jax.Array


def simulate(
    config: GeneratorConfig, velocity: Velocity, noise: jax.Array, sigmas: jax.Array, step: jax.Array, key: jax.Array
) -> Input:
    """What the student reads at its step `step` int32 [B], from 0, when it has taken those before. No gradient.

    noise: [B, N, C], float32. sigmas: float32 [steps + 1], those of `sampler.sigma_schedule`. key: of fresh noise, for
    a transition that has some.
    """
    latents = _walk(config, velocity, noise, sigmas, step, key, to_clean=False)
    # One-hot rather than indexed: rows of a mesh have no rule for that.
    chosen = step[:, None] == jnp.arange(config.num_inference_steps)
    return Input(jax.lax.stop_gradient(latents), jnp.sum(jnp.where(chosen, sigmas[:-1], 0), axis=1))


def generate(
    config: GeneratorConfig, velocity: Velocity, noise: jax.Array, sigmas: jax.Array, step: jax.Array, key: jax.Array
) -> jax.Array:
    """The clean prediction [B, N, C] of the student's step `step`, as `predict` of `simulate`. No gradient."""
    return jax.lax.stop_gradient(_walk(config, velocity, noise, sigmas, step, key, to_clean=True))


def predict(velocity: Velocity, at: Input) -> jax.Array:
    """The clean prediction [B, N, C] of one step, with its gradient."""
    x = at.latents
    return x - at.sigma[:, None, None] * velocity(x, level_of_rows(x, at.sigma)).astype(x.dtype)


def _walk(config, velocity, noise, sigmas, step, key, to_clean: bool) -> jax.Array:
    """Through the steps before `step`; with `to_clean` through that one too, which then ends at 0."""
    own = step[:, None, None]

    def turn(number, x):
        sigma, following = sigmas[number], sigmas[number + 1]
        if to_clean:
            following = jnp.where(own == number, 0, following)
        change = velocity(x, level_of_rows(x, sigma)).astype(x.dtype)
        if config.transition == "euler":
            moved = x + (following - sigma) * change
        else:
            fresh = flow.noise_like(jax.random.fold_in(key, number), x)
            moved = (1 - following) * (x - sigma * change) + following * fresh
        return jnp.where(number < own + int(to_clean), moved, x)

    return jax.lax.fori_loop(0, jnp.max(step) + int(to_clean), turn, noise)
