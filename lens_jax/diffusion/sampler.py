"""Sampling as the release does it: its schedule, its norm-rescaled guidance, Euler steps, one compiled loop."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lens_jax.errors import LensError

# From here on the shift no longer depends on the number of steps (release: compute_empirical_mu, FLUX.2's fit).
_LONG_SEQUENCE = 4300


def schedule_mu(image_tokens: int, num_inference_steps: int) -> float:
    """Log of the schedule's shift: a fit for 10 steps and one for 200, interpolated; only the latter if long."""
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > _LONG_SEQUENCE:
        return at_200
    at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * num_inference_steps + at_200 - 200.0 * slope


def sigma_schedule(image_tokens: int, num_inference_steps: int) -> np.ndarray:
    """Noise levels float32 [steps + 1] from 1 down to 0: 1 - i/N, shifted by exp(mu), then the final 0."""
    if num_inference_steps < 1:
        raise LensError(f"num_inference_steps is {num_inference_steps}; it must be at least 1")
    shift = np.exp(schedule_mu(image_tokens, num_inference_steps))
    sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps, dtype=np.float32).astype(np.float64)
    return np.append(shift / (shift + 1 / sigmas - 1), 0.0).astype(np.float32)


def guide(conditional: jax.Array, unconditional: jax.Array, guidance_scale: jax.Array) -> jax.Array:
    """Guided velocity [B, N, C] rescaled, token by token, to the norm of the conditional one (release: CFG)."""
    combined = unconditional + guidance_scale * (conditional - unconditional)
    norm = lambda x: jnp.linalg.norm(x, axis=-1, keepdims=True)
    combined_norm = norm(combined)
    factor = jnp.where(combined_norm > 0, norm(conditional) / jnp.maximum(combined_norm, 1e-12), 1.0)
    return combined * factor


def euler_sample(velocity: Callable, latents: jax.Array, sigmas: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Integrate `velocity(latents, t [B])` over sigmas [steps + 1] from noise to clean.

    Returns the final latents [B, N, C] and the latents after each step [steps, B, N, C] (dropped by XLA if unused).
    The state stays float32 between steps; the release rounds it to the denoiser's dtype each time.
    """

    def step(x, sigma_pair):
        sigma, following = sigma_pair
        t = jnp.full((x.shape[0],), sigma, jnp.float32)
        x = x + (following - sigma) * velocity(x, t).astype(x.dtype)
        return x, x

    return jax.lax.scan(step, latents, (sigmas[:-1], sigmas[1:]))
