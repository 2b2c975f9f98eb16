"""Losses of reinforcement learning on a batch: what `run.step` differentiates.

Where the old policy is the trained one at every update (`on_policy`), its forward pass is that of the trained one.

A batch has `text`, `text_lengths`, `positions` and `n_image` as in pre-training, `weight` [B], which is 0 for rows that
only fill it up or have no reward, and what the algorithm needs of a rollout.
"""

import jax
import jax.numpy as jnp

from lens_jax.diffusion import flow, sde
from lens_jax.posttraining import grpo, nft
from lens_jax.posttraining.grpo import GrpoConfig
from lens_jax.posttraining.nft import NftConfig
from lens_jax.posttraining.policy import Policy
from lens_jax.run.state import Tree
from lens_jax.run.step import Batch

Result = tuple[jax.Array, dict[str, jax.Array]]


def nft_loss(
    policy: Policy, config: NftConfig, on_policy: bool, params: Tree, fixed: Tree, batch: Batch, key: jax.Array
) -> Result:
    """The mean of DiffusionNFT's loss over the rows that count, and sums of its parts.

    batch: `latents` [B, N, C] of a rollout, `t` [B] in (0, 1] and `r` [B] in [0, 1].
    """
    clean, t, n_image = batch["latents"], batch["t"], batch.get("n_image")
    noise = flow.noise_like(key, clean)
    x = flow.interpolate(clean, noise, t)
    trained = policy.velocity(fixed, params[policy.trained], batch)(x, t)
    old = trained if on_policy else policy.velocity(fixed, fixed["old"], batch)(x, t)
    losses = nft.policy_loss(config, trained, old, noise - clean, t, batch["r"], n_image)
    distance = _distance(policy, config.kl, fixed, batch, x, t, trained)
    return _weighted(batch["weight"], losses + config.kl * distance, {"policy_loss": losses, "kl": distance})


def _distance(policy: Policy, kl: float, fixed: Tree, batch: Batch, x, t, trained) -> jax.Array:
    """Mean squared distance of velocities to the reference's, float32 [B]; its forward pass is left out at weight 0."""
    if not kl:
        return jnp.zeros_like(t)
    reference = policy.velocity(fixed, None, batch)(x, t)
    difference = trained.astype(jnp.float32) - reference.astype(jnp.float32)
    return flow.mean_of_tokens(jnp.square(difference), batch.get("n_image"))


def grpo_loss(
    policy: Policy,
    config: GrpoConfig,
    on_policy: bool,
    guidance_scale: float,
    params: Tree,
    fixed: Tree,
    batch: Batch,
    key: jax.Array,
) -> Result:
    """The mean of Flow-GRPO's loss of one step over the rows that count, and sums of its parts.

    batch: `latents` [B, N, C] before the step and `after` it, `step`: sigma, the next sigma and the noise, float32
    scalars, and `advantage` [B].
    """
    del key  # what was random was drawn in the rollout
    x, step, n_image = batch["latents"], sde.Step(*batch["step"]), batch.get("n_image")
    t = flow.by_rows(jnp.broadcast_to(step.sigma, len(x)), x)
    scale = None if guidance_scale == 1 else jnp.float32(guidance_scale)

    def mean(tree: dict | None) -> jax.Array:
        velocity = policy.velocity(fixed, tree, batch, scale)
        return sde.mean_after(step, x, velocity(x, t).astype(jnp.float32))

    trained = mean(params[policy.trained])
    old = trained if on_policy else mean(fixed["old"])
    losses, ratio = grpo.policy_loss(config, step, batch["after"], trained, old, batch["advantage"], n_image)
    distance = grpo.kl_to(step, trained, mean(None), n_image) if config.kl else jnp.zeros_like(t)
    parts = {
        "policy_loss": losses,
        "kl": distance,
        "ratio_deviation": jnp.abs(ratio - 1),
        "clipped": (jnp.abs(ratio - 1) > config.clip).astype(jnp.float32),
    }
    return _weighted(batch["weight"], losses + config.kl * distance, parts)


def _weighted(weight: jax.Array, losses: jax.Array, parts: dict[str, jax.Array]) -> Result:
    """The mean loss of the rows that count; of every part its sum over them and their number, [2], to log."""
    total = jnp.sum(weight)
    sums = {name: jnp.stack([jnp.sum(weight * jax.lax.stop_gradient(part)), total]) for name, part in parts.items()}
    # Weights are 0 or 1; a batch without any counts 0 in the update too.
    return jnp.sum(weight * losses) / jnp.maximum(total, 1), sums


def weigh(batch: Batch) -> jax.Array:
    """What a batch counts in an update: as much as its rows."""
    return jnp.sum(batch["weight"])
