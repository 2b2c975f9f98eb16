"""What training minimises."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lens_jax.diffusion import flow


def velocity_loss(
    denoise: Callable, latents: jax.Array, t: jax.Array, noise: jax.Array, n_image: jax.Array | None = None
) -> jax.Array:
    """Mean squared velocity error a sample, float32 [B].

    `denoise(noisy, t)` gives the velocity for noisy latents [B, N, C] at t [B]; of the N tokens the first `n_image`
    count, all where it is None.
    """
    velocity = denoise(flow.interpolate(latents, noise, t), t)
    error = jnp.square(velocity.astype(jnp.float32) - (noise - latents))
    return flow.mean_of_tokens(error, n_image)
