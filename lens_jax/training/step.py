"""One optimiser step: a pure function of state and batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from lens_jax.diffusion import flow
from lens_jax.diffusion.flow import FlowConfig
from lens_jax.models import denoiser
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.training.state import State

# The loss is also reported by noise level, in this many equal bins of t.
NOISE_BINS = 5


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What the step depends on; hashable, so that it can be a static argument."""

    model: DenoiserConfig
    flow: FlowConfig
    # Micro-batches summed into one update.
    accumulation: int
    # Decay of the moving average of the parameters.
    ema_decay: float
    # Leave the state as it was when the loss or a gradient is not finite.
    skip_nonfinite: bool


def train_step(
    config: StepConfig, optimizer: optax.GradientTransformation, state: State, batch: dict
) -> tuple[State, dict]:
    """Returns the next state and float32 scalars (arrays [NOISE_BINS] for the two `noise_bin` entries).

    batch: `latents` [B, N, C], `text` a tuple of [B, T, width], `text_lengths` int32 [B] and `positions` int32
    [N + T, 3]. Positions are an input, so buckets with the same number of tokens share one compiled program.
    """
    key = jax.random.fold_in(state.key, state.step)
    batch = dict(batch)
    positions = batch.pop("positions")
    micro_batches = jax.tree.map(lambda x: x.reshape(config.accumulation, -1, *x.shape[1:]), batch)
    keys = jax.random.split(key, config.accumulation)
    loss_and_gradient = jax.value_and_grad(functools.partial(_loss, config, positions), has_aux=True)

    if config.accumulation == 1:
        (loss, bins), gradients = loss_and_gradient(state.params, jax.tree.map(lambda x: x[0], micro_batches), keys[0])
    else:

        def accumulate(total, xs):
            (loss, bins), gradients = loss_and_gradient(state.params, *xs)
            return jax.tree.map(jnp.add, total, (loss, bins, gradients)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params)
        start = (jnp.zeros(()), (jnp.zeros(NOISE_BINS), jnp.zeros(NOISE_BINS)), zeros)
        (loss, bins, gradients), _ = jax.lax.scan(accumulate, start, (micro_batches, keys))
        loss, gradients = jax.tree.map(lambda x: x / config.accumulation, (loss, gradients))

    gradient_norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Early on the average would be mostly the initial parameters, so its decay grows to the configured one.
    decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p.astype(jnp.float32) - e), state.ema, params)
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    updated = state.replace(step=state.step + 1, params=params, ema=ema, opt_state=opt_state)
    if config.skip_nonfinite:
        unchanged = state.replace(step=state.step + 1)
        updated = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, unchanged)
    metrics = {
        "loss": loss,
        "gradient_norm": gradient_norm,
        "update_norm": optax.tree.norm(updates),
        "parameter_norm": optax.tree.norm(params),
        "noise_bin_loss": bins[0],
        "noise_bin_count": bins[1],
        "finite": finite,
    }
    return updated, metrics


def _loss(config: StepConfig, positions: jax.Array, params: dict, batch: dict, key: jax.Array):
    """Mean loss of one micro-batch, and per noise bin the sum of losses and the number of samples."""
    key_t, key_noise, key_drop = jax.random.split(key, 3)
    latents = batch["latents"]
    t = flow.sample_noise_levels(config.flow, key_t, *latents.shape[:2])
    noise = jax.random.normal(key_noise, latents.shape)
    lengths = flow.drop_captions(config.flow, key_drop, batch["text_lengths"])
    losses = _sample_losses(config, params, latents, batch["text"], lengths, t, noise, positions)
    bins = jnp.clip((t * NOISE_BINS).astype(jnp.int32), 0, NOISE_BINS - 1)
    by_bin = jnp.zeros(NOISE_BINS).at[bins].add(losses), jnp.zeros(NOISE_BINS).at[bins].add(1.0)
    return losses.mean(), by_bin


def _sample_losses(config: StepConfig, params, latents, text, lengths, t, noise, positions):
    denoise = lambda x, t: denoiser.apply(config.model, params, x, text, lengths, t, positions)
    return flow.velocity_loss(denoise, latents, t, noise)


def validation_losses(config: StepConfig, params: dict, batch: dict, key: jax.Array) -> jax.Array:
    """Loss a sample [B] at fixed quantiles of the noise levels, with noise from `key`: the same for every model."""
    latents = batch["latents"]
    key_order, key_noise = jax.random.split(key)
    # Shuffled, so that a noise level does not always meet the same row of the batch.
    t = jax.random.permutation(key_order, flow.noise_level_quantiles(config.flow, *latents.shape[:2]))
    noise = jax.random.normal(key_noise, latents.shape)
    lengths = batch["text_lengths"]
    return _sample_losses(config, params, latents, batch["text"], lengths, t, noise, batch["positions"])
