"""Sampling as the release does it: its schedule, its norm-rescaled guidance, Euler steps; and a second-order solver.

Pure: noise to latents as a function of a network that is passed in, on one device or on a mesh.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lens_jax.errors import LensError

Solver = Literal["euler", "dpm2"]
# Feature layers [B, T, width] and lengths int32 [B].
Text = tuple[tuple[jax.Array, ...], jax.Array]
# (latents [B, N, C], t [B], text, positions int32 [N + T, 3]) -> velocity [B, N, C]
Denoise = Callable[[jax.Array, jax.Array, Text, jax.Array], jax.Array]
# (latents [B, N, C], t [B]) -> velocity [B, N, C]
Velocity = Callable[[jax.Array, jax.Array], jax.Array]

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
    """Noise levels float32 [steps + 1] from 1 down to 0: 1 - i/N, shifted by exp(mu), then the final 0.

    Bit for bit those of the release, whose scheduler rounds every operation on an array to float32.
    """
    if num_inference_steps < 1:
        raise LensError(f"num_inference_steps is {num_inference_steps}; it must be at least 1")
    shift = np.float32(math.exp(schedule_mu(image_tokens, num_inference_steps)))
    one = np.float32(1)
    sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps).astype(np.float32)
    return np.append(shift / (shift + (one / sigmas - one)), np.float32(0))


def guide(conditional: jax.Array, unconditional: jax.Array, guidance_scale: jax.Array) -> jax.Array:
    """Guided velocity [B, N, C] rescaled, token by token, to the norm of the conditional one (release: CFG)."""
    combined = unconditional + guidance_scale * (conditional - unconditional)
    norm = lambda x: jnp.linalg.norm(x, axis=-1, keepdims=True)
    combined_norm = norm(combined)
    factor = jnp.where(combined_norm > 0, norm(conditional) / jnp.maximum(combined_norm, 1e-12), 1.0)
    return combined * factor


def sample(
    denoise: Denoise,
    latents: jax.Array,
    text: Text,
    negative: Text | None,
    positions: jax.Array,
    sigmas: jax.Array,
    guidance_scale: jax.Array | None = None,
    solver: Solver = "euler",
) -> jax.Array:
    """Noise to final latents: the whole program, pure, on one device or on the mesh that is set.

    Args:
      denoise: (latents, t [B], text, positions) -> velocity. It alone knows the network and where its weights are.
      latents: the noise [B, N, C]; on a mesh its rows may be sharded, and those of all texts alike.
      text, negative: feature layers and lengths of each row. None is no text at all: the image attends to itself.
      positions: int32 [N + T, 3] for the longer of the two texts. Those of text do not depend on the padding.
      sigmas: noise levels [steps + 1] from `sigma_schedule`.
      guidance_scale: None runs no second branch.
    """
    velocity = guided(denoise, latents.shape[1], text, negative, positions, guidance_scale)
    return SOLVERS[solver](velocity, latents, sigmas)[0]


def guided(
    denoise: Denoise,
    image_tokens: int,
    text: Text,
    negative: Text | None,
    positions: jax.Array,
    guidance_scale: jax.Array | None = None,
) -> Velocity:
    """The velocity that is integrated, of latents with so many tokens; the rest as in `sample`."""

    def branch(x, t, text):
        return denoise(x, t, text, positions[: image_tokens + text[0][0].shape[1]])

    def velocity(x, t):
        conditional = branch(x, t, text)
        if guidance_scale is None:
            return conditional
        # Without text the text stream need not be there.
        other = (tuple(layer[:, :0] for layer in text[0]), jnp.zeros_like(text[1])) if negative is None else negative
        return guide(conditional, branch(x, t, other), guidance_scale)

    return velocity


def euler(velocity: Velocity, latents: jax.Array, sigmas: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Integrate `velocity(latents, t [B])` over sigmas [steps + 1] from noise to clean.

    Returns the final latents [B, N, C] and the latents after each step [steps, B, N, C] (dropped by XLA if unused).
    The state stays float32 between steps; the release rounds it to the denoiser's dtype each time.
    """

    def step(x, sigma_pair):
        sigma, following = sigma_pair
        x = x + (following - sigma) * velocity(x, level_of_rows(x, sigma)).astype(x.dtype)
        return x, x

    return jax.lax.scan(step, latents, (sigmas[:-1], sigmas[1:]))


def dpm2(velocity: Velocity, latents: jax.Array, sigmas: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `euler`, of second order with one network call a step: DPM-Solver++(2M) on the clean latents.

    With m = x - sigma v and lambda = ln((1 - sigma) / sigma), which grows by h in this step and by h0 in the last one:
    x' = (sigma' / sigma) x - (1 - sigma') (exp(-h) - 1) (m + h / (2 h0) (m - m0)). As (1 - sigma') (exp(-h) - 1) is
    (sigma' - sigma) / sigma, this is Euler's step and a correction, which the first and the last step leave out.
    """

    def step(carry, inputs):
        x, before = carry
        sigma, following, correction = inputs
        v = velocity(x, level_of_rows(x, sigma)).astype(x.dtype)
        clean = x - sigma * v
        x = x + (following - sigma) * v + (1 - following / sigma) * correction * (clean - before)
        return (x, clean), x

    inputs = (sigmas[:-1], sigmas[1:], _corrections(sigmas))
    (final, _), trajectory = jax.lax.scan(step, (latents, jnp.zeros_like(latents)), inputs)
    return final, trajectory


SOLVERS = {"euler": euler, "dpm2": dpm2}


def _corrections(sigmas: jax.Array) -> jax.Array:
    """h / (2 h0) a step [steps]: 0 in the first, in the last, and in one after pure noise, whose h0 is infinite."""
    inside = (sigmas > 0) & (sigmas < 1)
    safe = jnp.where(inside, sigmas, 0.5)
    log_ratio = jnp.log1p(-safe) - jnp.log(safe)
    h = log_ratio[1:] - log_ratio[:-1]
    finite = inside[1:] & inside[:-1]
    usable = finite[1:] & finite[:-1]
    # The last step is first-order whatever it ends at.
    usable = usable & (jnp.arange(len(usable)) < len(usable) - 1)
    ratio = h[1:] / jnp.where(usable, 2 * h[:-1], 1)
    return jnp.concatenate([jnp.zeros(1), jnp.where(usable, ratio, 0)]).astype(jnp.float32)


def level_of_rows(x: jax.Array, sigma: jax.Array) -> jax.Array:
    """t for each row [B], laid out like the rows: else every device would compute the modulation of all of them.

    t is sigma on its way through the timesteps of the release, 1000 sigma, which its pipeline divides by 1000 again: of
    the values between 0 and 1, 3 % come back an ulp away. XLA would cancel the two or multiply by 0.001 instead.
    """
    thousand = jax.lax.optimization_barrier(jnp.float32(1000))
    timestep = jax.lax.optimization_barrier(sigma.astype(jnp.float32) * thousand)
    t = jnp.broadcast_to(timestep / thousand, x.shape[:1])
    return (
        t if jax.sharding.get_abstract_mesh().empty else jax.reshard(t, PartitionSpec(jax.typeof(x).sharding.spec[0]))
    )
