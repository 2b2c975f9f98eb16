"""DiffusionNFT (arXiv 2509.16117), with which the report turns Lens-Base into Lens (its section 4).

For a clean sample x0 of a rollout with goodness r in [0, 1], noised to x_t with velocity target v = noise - x0, the
trained policy's velocity is read as two: v+ = beta v_theta + (1 - beta) v_old is pulled to v by r, and its mirror image
v- = (1 + beta) v_old - beta v_theta by 1 - r. Clean samples of the old policy and their rewards are all it needs: no
trajectory, no likelihood, any solver.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from lens_jax.diffusion.flow import mean_of_tokens
from lens_jax.errors import LensError

# Least weight, as in the reference code: there of the mean absolute error of x0.
_FLOOR = 1e-5


@dataclasses.dataclass(frozen=True)
class NftConfig:
    """DiffusionNFT's loss. The defaults are the report's, and the reference code's where it is silent."""

    # How far the two implicit policies lie from the old one. Report: 1. The reference takes 0.1 for several rewards.
    beta: float = 1.0
    # Weight of the squared distance of the velocity to that of the model before RL. Report: 1e-4.
    kl: float = 1e-4
    # Advantages, in standard deviations of the epoch's rewards, at which r is 0 or 1; the loss is multiplied by it, so
    # that it does not change the gradient of those below. The report says "Z_c, typically the global std", which is 1
    # and saturates a third of a Gaussian's samples; the reference code has 5.
    z_c: float = 5.0
    # Share of the sampling noise levels that are trained on, of 1: of 10 of them 9, drawn for each image. The reference
    # has 0.99, Flow-Factory two levels.
    timesteps: float = 0.99
    # They are drawn from this share of the levels, the noisiest: what an image shows is decided there. Reference: 1;
    # Flow-Factory: 0.5. docs/rl.md has how much of the gradient is signal at which level.
    noisier: float = 1.0
    # How the old policy follows after each epoch: not at all behind (0); min(0.001 step, 0.5) (1), which is what the
    # report's "min(0.001, 0.5)" is in the reference; 0 for 75 steps, then 0.0075 a step up to 0.999 (2), which the
    # reference takes with beta 0.1.
    old_decay: Literal[0, 1, 2] = 1

    def __post_init__(self):
        if not (self.beta > 0 and self.z_c > 0):
            raise LensError(f"nft.beta is {self.beta} and nft.z_c {self.z_c}; both must be positive")
        if not self.kl >= 0:
            raise LensError(f"nft.kl is {self.kl}; it must be 0 or more")
        for name in ("timesteps", "noisier"):
            if not 0 < getattr(self, name) <= 1:
                raise LensError(f"nft.{name} is {getattr(self, name)}; it must be above 0 and at most 1")


def levels(config: NftConfig, num_inference_steps: int) -> tuple[int, int]:
    """(how many of the sampling noise levels, from the noisiest on, an image may be trained at; at how many it is)."""
    pool = max(1, math.ceil(config.noisier * num_inference_steps))
    return pool, min(pool, max(1, int(config.timesteps * num_inference_steps)))


def old_decay(kind: int, step: int | jax.Array) -> jax.Array:
    """eta after `step` optimiser steps: old <- eta old + (1 - eta) trained. Kinds as in `NftConfig.old_decay`."""
    step = jnp.asarray(step, jnp.float32)
    if kind == 0:
        return jnp.zeros_like(step)
    if kind == 1:
        return jnp.minimum(0.001 * step, 0.5)
    return jnp.clip(0.0075 * (step - 75), 0, 0.999)


def policy_loss(
    config: NftConfig,
    trained: jax.Array,
    old: jax.Array,
    target: jax.Array,
    t: jax.Array,
    r: jax.Array,
    n_image: jax.Array | None = None,
) -> jax.Array:
    """z_c / beta (r mean|x0+ - x0|^2 / w+ + (1 - r) mean|x0- - x0|^2 / w-), float32 [B], w = mean|x0 -+ x0| constant.

    Of velocities, in which it is the same: x0 from a velocity is off by -t times the velocity's error, so a term is
    t mean|v+ - v|^2 / mean|v+ - v|. No x0 is formed, so nothing cancels.

    Args:
      trained, old: velocities [B, N, C] at (x_t, t); no gradient reaches `old`.
      target: noise - x0.
      t: noise levels [B].
      r: goodness [B].
    """
    trained, old = trained.astype(jnp.float32), jax.lax.stop_gradient(old.astype(jnp.float32))
    step = config.beta * (trained - old)
    terms = 0.0
    for error, share in ((old + step - target, r), (old - step - target, 1 - r)):
        size = jax.lax.stop_gradient(mean_of_tokens(jnp.abs(error), n_image))
        # t**2 / max(t size, floor): the floor is of x0.
        weight = jnp.square(t) / jnp.maximum(t * size, _FLOOR)
        terms += share * weight * mean_of_tokens(jnp.square(error), n_image)
    return config.z_c / config.beta * terms
