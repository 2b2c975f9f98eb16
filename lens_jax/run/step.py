"""One optimiser step: a pure function of state and batch."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec

from lens_jax import parallel
from lens_jax.diffusion import flow
from lens_jax.diffusion.flow import FlowConfig
from lens_jax.models import denoiser
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.layers import layout
from lens_jax.run.state import State

# The loss is also reported by noise level, in this many equal bins of t.
NOISE_BINS = 5


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What the step depends on; hashable, so that it can be a static argument."""

    model: DenoiserConfig
    flow: FlowConfig
    # Decay of the moving average of the parameters.
    ema_decay: float
    # Leave the state as it was when the loss or a gradient is not finite.
    skip_nonfinite: bool
    # What a micro-step counts in an update: as much as any other ("batch", the report's ranks), or by its images.
    weighting: Literal["batch", "image"] = "batch"
    # Average and moments are in the memory of the host, and come to the devices for the update alone.
    offload: bool = False
    # What gradients are summed in over the devices.
    reduce_dtype: Literal["compute", "float32"] = "compute"


class Totals(struct.PyTreeNode):
    """Sums over the micro-steps of one update."""

    # Gradients times weights, in float32, laid out like the parameters.
    gradients: dict
    # Losses times weights.
    loss: jax.Array
    weight: jax.Array
    # Loss of each micro-step.
    losses: jax.Array
    # By noise level, [NOISE_BINS] each.
    bin_loss: jax.Array
    bin_count: jax.Array


def empty_totals(params: dict, micro_steps: int) -> Totals:
    """The sums of an update of so many micro-steps before the first of them."""
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
    scalar, bins = jnp.zeros(()), jnp.zeros(NOISE_BINS)
    losses = jnp.zeros(micro_steps)
    return Totals(gradients=zeros, loss=scalar, weight=scalar, losses=losses, bin_loss=bins, bin_count=bins)


def micro_step(config: StepConfig, state: State, totals: Totals | None, batch: dict, micro: int | jax.Array) -> Totals:
    """Add the gradients of one batch of one bucket to `totals`; None starts anew.

    batch: `latents` [B, N, C], `text` a tuple of [B, T, width], `text_lengths` int32 [B], `positions` int32 [N + T, 3]
    and, where latents are padded, `n_image` int32 scalar. Positions and `n_image` are inputs, so buckets with the same
    (padded) number of tokens share one compiled program. `micro` counts the batches of an update, for the randomness.
    """
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), micro)
    loss_and_gradient = jax.value_and_grad(functools.partial(_loss, config), has_aux=True)
    (loss, bins), gradients = loss_and_gradient(state.params, batch, key)
    weight = jnp.float32(len(batch["latents"]) if config.weighting == "image" else 1)
    gradients = jax.tree.map(lambda g: weight * g.astype(jnp.float32), gradients)
    count = 1 if totals is None else len(totals.losses)
    new = Totals(
        gradients=gradients,
        loss=weight * loss,
        weight=weight,
        losses=jnp.where(jnp.arange(count) == micro, loss, 0),
        bin_loss=bins[0],
        bin_count=bins[1],
    )
    return new if totals is None else jax.tree.map(jnp.add, totals, new)


def update(
    config: StepConfig, optimizer: optax.GradientTransformation, state: State, totals: Totals
) -> tuple[State, dict]:
    """The next state, and float32 scalars (`losses` [micro-steps], the two `noise_bin` entries [NOISE_BINS])."""
    if config.offload:
        state = parallel.move_offloaded(state, jax.memory.Space.Device)
    loss = totals.loss / totals.weight
    gradients = jax.tree.map(lambda g: g / totals.weight, totals.gradients)
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
    if config.offload:
        updated = parallel.move_offloaded(updated, jax.memory.Space.Host)
    metrics = {
        "loss": loss,
        "losses": totals.losses,
        "gradient_norm": gradient_norm,
        "update_norm": optax.tree.norm(updates),
        "parameter_norm": optax.tree.norm(params),
        "noise_bin_loss": totals.bin_loss,
        "noise_bin_count": totals.bin_count,
        "finite": finite,
    }
    return updated, metrics


def train_step(
    config: StepConfig, optimizer: optax.GradientTransformation, state: State, batch: dict
) -> tuple[State, dict]:
    """An update from one batch, in one program without sums in between."""
    return update(config, optimizer, state, micro_step(config, state, None, batch, 0))


def _loss(config: StepConfig, params: dict, batch: dict, key: jax.Array):
    """Mean loss of one micro-batch, and per noise bin the sum of losses and the number of samples."""
    key_t, key_noise, key_drop = jax.random.split(key, 3)
    latents = batch["latents"]
    t = _by_rows(flow.sample_noise_levels(config.flow, key_t, len(latents), _image_tokens(batch)), latents)
    noise = _noise(key_noise, latents)
    lengths = flow.drop_captions(config.flow, key_drop, batch["text_lengths"])
    losses = _sample_losses(config, params, batch, lengths, t, noise)
    # One-hot rather than scattered: a scatter from sharded rows has no rule.
    in_bin = jnp.clip((t * NOISE_BINS).astype(jnp.int32), 0, NOISE_BINS - 1)[:, None] == jnp.arange(NOISE_BINS)
    by_bin = jnp.sum(in_bin * losses[:, None], 0), jnp.sum(in_bin, 0, dtype=jnp.float32)
    return losses.mean(), by_bin


def _image_tokens(batch: dict) -> int | jax.Array:
    return batch.get("n_image", batch["latents"].shape[1])


def _noise(key: jax.Array, latents: jax.Array) -> jax.Array:
    """Laid out like the latents, so that no device draws the noise of the others' rows.

    Drawn with the tokens first, so that padding comes last and a batch has the same noise with and without it.
    """
    rows, tokens, channels = latents.shape
    place = layout(latents)
    if place is not None:
        by_row, by_token, by_channel = (*place.spec, None, None, None)[:3]
        place = PartitionSpec(by_token, by_row, by_channel)
    return jax.random.normal(key, (tokens, rows, channels), out_sharding=place).swapaxes(0, 1)


def _by_rows(x: jax.Array, latents: jax.Array) -> jax.Array:
    """A number a sample laid out like the samples: else every device would compute the modulation of all of them."""
    place = layout(latents)
    return x if place is None else jax.reshard(x, PartitionSpec(place.spec[0]))


def _sample_losses(config: StepConfig, params, batch, lengths, t, noise):
    n_image = batch.get("n_image")
    gather = functools.partial(parallel.gather, dtype=config.model.dtype, reduce_dtype=config.reduce_dtype)

    def denoise(x, t):
        inputs = batch["text"], lengths, t, batch["positions"]
        return denoiser.apply(config.model, params, x, *inputs, n_image, gather)

    return flow.velocity_loss(denoise, batch["latents"], t, noise, n_image)


def validation_loss(config: StepConfig, params: dict, batch: dict, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of weight x loss, sum of weights) over the rows of a batch, whose `weight` [B] is 0 for repeated ones.

    At fixed quantiles of the noise levels, with noise from `key`: the same for every model.
    """
    latents = batch["latents"]
    key_order, key_noise = jax.random.split(key)
    # Shuffled, so that a noise level does not always meet the same row of the batch.
    t = jax.random.permutation(key_order, flow.noise_level_quantiles(config.flow, len(latents), _image_tokens(batch)))
    t, noise = _by_rows(t, latents), _noise(key_noise, latents)
    losses = _sample_losses(config, params, batch, batch["text_lengths"], t, noise)
    return jnp.sum(losses * batch["weight"]), jnp.sum(batch["weight"])
