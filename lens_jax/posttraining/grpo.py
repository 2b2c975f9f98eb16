"""Flow-GRPO (arXiv 2505.05470): a clipped policy gradient on the steps of an SDE sampler; the usual alternative to NFT.

A step of `diffusion.sde` is a Gaussian policy whose mean the network gives, so the ratio of two policies is known in
closed form. The old policy's mean is computed again beside the trained one's, by the same program, instead of being
kept from the rollout: before the first update both are then the same numbers, and the ratio is 1, whatever the rollout
rounded.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lens_jax.diffusion import sde
from lens_jax.diffusion.flow import mean_of_tokens
from lens_jax.errors import LensError


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """Flow-GRPO's loss. The defaults are its preset for SD3.5-M."""

    # How noisy the steps are (a of Flow-GRPO): 0.7 for SD3.5-M, 0.9 for FLUX.1, 1.2 for Qwen-Image.
    noise: float = 0.7
    # Steps with noise, and so trained on, from the first; 0 is all but the last one. The last is always one of the ODE:
    # no later step would take its noise out of the image.
    noisy_steps: int = 0
    # The ratio of the policies counts up to 1 +- this; of log-probabilities that are means over the latents.
    clip: float = 1e-4
    # Advantages are clipped to so many standard deviations of the epoch's rewards.
    advantage_clip: float = 5.0
    # Weight of the distance of the mean to that of the model before RL, over twice the squared noise.
    kl: float = 0.04

    def __post_init__(self):
        if not (self.noise > 0 and self.clip > 0 and self.advantage_clip > 0):
            raise LensError("grpo.noise, grpo.clip and grpo.advantage_clip must be positive")
        if not (self.kl >= 0 and self.noisy_steps >= 0):
            raise LensError("grpo.kl and grpo.noisy_steps must be 0 or more")


def trained_steps(config: GrpoConfig, num_inference_steps: int) -> int:
    """Steps with noise, which are the first ones."""
    most = num_inference_steps - 1
    return min(config.noisy_steps or most, most)


def policy_loss(
    config: GrpoConfig,
    step: sde.Step,
    after: jax.Array,
    trained: jax.Array,
    old: jax.Array,
    advantages: jax.Array,
    n_image: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(max(-A rho, -A clip(rho, 1 +- c)), rho) of a step, float32 [B] each.

    Args:
      after: the latents [B, N, C] that the old policy stepped to.
      trained, old: means [B, N, C] of that step; no gradient reaches `old`.
      advantages: [B], clipped here.
    """
    ratio = jnp.exp(sde.log_ratio(step, after, trained, jax.lax.stop_gradient(old), n_image))
    a = jnp.clip(advantages, -config.advantage_clip, config.advantage_clip)
    clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
    return jnp.maximum(-a * ratio, -a * clipped), ratio


def kl_to(step: sde.Step, trained: jax.Array, reference: jax.Array, n_image: jax.Array | None = None) -> jax.Array:
    """mean(mean - reference mean)^2 / (2 s^2), float32 [B]; without the step's length, as Flow-GRPO's code has it."""
    return mean_of_tokens(jnp.square(trained - jax.lax.stop_gradient(reference)), n_image) / (
        2 * jnp.square(step.noise)
    )
