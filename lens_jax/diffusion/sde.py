"""Sampling with noise in every step: an SDE with the marginals of the flow's ODE, as Flow-GRPO explores with.

One step from sigma to sigma', dt = sigma' - sigma < 0, is Gaussian:
    x' = mean + s sqrt(-dt) z,   s = level sqrt(sigma / (1 - sigma)), at sigma = 1 the second sigma in the root's 1 -,
    mean = x (1 + s^2 dt / (2 sigma)) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt.
With level 0 it is Euler's step, operation by operation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lens_jax.diffusion.flow import mean_of_tokens
from lens_jax.diffusion.sampler import Velocity, level_of_rows


class Step(NamedTuple):
    """Float32 scalars of one step, or arrays [steps] of all."""

    sigma: jax.Array
    following: jax.Array
    # s above.
    noise: jax.Array

    @property
    def dt(self) -> jax.Array:
        return self.following - self.sigma

    @property
    def deviation(self) -> jax.Array:
        """Standard deviation of the step."""
        return self.noise * jnp.sqrt(-self.dt)


def steps_of(sigmas: jax.Array, levels: jax.Array) -> Step:
    """The steps of noise levels sigmas [steps + 1] with `levels` [steps], the a of Flow-GRPO."""
    sigma = sigmas[:-1]
    below_one = jnp.where(sigma < 1, sigma, sigmas[1])
    return Step(sigma, sigmas[1:], levels * jnp.sqrt(sigma / (1 - below_one)))


def mean_after(step: Step, x: jax.Array, velocity: jax.Array) -> jax.Array:
    """The mean of x' given x and the velocity there, [B, N, C]."""
    half = jnp.square(step.noise) / (2 * step.sigma)
    return x * (1 + half * step.dt) + velocity.astype(x.dtype) * (1 + half * (1 - step.sigma)) * step.dt


def log_ratio(
    step: Step, after: jax.Array, mean: jax.Array, other: jax.Array, n_image: jax.Array | None = None
) -> jax.Array:
    """log p(after | mean) - log p(after | other) of a step, averaged over the latent dimensions: float32 [B].

    As one product and not as a difference of two logarithms: of equal means it is 0 exactly.
    """
    return mean_of_tokens((mean - other) * (2 * after - mean - other), n_image) / (2 * jnp.square(step.deviation))


def sample(
    velocity: Velocity, latents: jax.Array, sigmas: jax.Array, levels: jax.Array, draw: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The path [steps + 1, B, N, C] from noise [B, N, C] to the final latents, both included.

    Args:
      levels: [steps], how noisy each step is; 0 is a step of the ODE.
      draw: the number of a step -> its standard normal noise [B, N, C], laid out like the latents.
    """

    def one(x, inputs):
        step, number = inputs
        after = mean_after(step, x, velocity(x, level_of_rows(x, step.sigma)))
        x = after + step.deviation * draw(number)
        return x, x

    _, path = jax.lax.scan(one, latents, (steps_of(sigmas, levels), jnp.arange(len(sigmas) - 1)))
    return jnp.concatenate([latents[None], path])
