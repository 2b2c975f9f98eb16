"""What pre-training minimises (report 3): flow matching on batches of one shape."""

import functools

import jax
import jax.numpy as jnp

from lens_jax import parallel
from lens_jax.diffusion import flow, losses
from lens_jax.diffusion.flow import FlowConfig
from lens_jax.models import denoiser
from lens_jax.models import lora as low_rank
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.lora import Dropout, LoraConfig
from lens_jax.parallel.mesh import ReduceDtype
from lens_jax.run.state import Tree
from lens_jax.run.step import Batch

# The loss is also reported by noise level, in this many equal bins of t.
NOISE_BINS = 5


def training_loss(
    model: DenoiserConfig,
    config: FlowConfig,
    params: Tree,
    frozen: Tree,
    batch: Batch,
    key: jax.Array,
    *,
    lora: LoraConfig = low_rank.OFF,
    reduce_dtype: ReduceDtype = "compute",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss of a batch, and by noise level the sum of losses and the number of samples, [NOISE_BINS] each.

    batch: `latents` [B, N, C], `text` a tuple of [B, T, width], `text_lengths` int32 [B], `positions` int32 [N + T, 3]
    and, where latents are padded, `n_image` int32 scalar. Positions and `n_image` are inputs, so shapes with the same
    (padded) number of tokens share one compiled program. `lora` says which of the two trees has the denoiser (see
    `networks`). `reduce_dtype` is what gradients are summed in over devices.
    """
    key_t, key_noise, key_drop = jax.random.split(key, 3)
    latents = batch["latents"]
    t = flow.by_rows(flow.sample_noise_levels(config, key_t, len(latents), _image_tokens(batch)), latents)
    noise = flow.noise_like(key_noise, latents)
    lengths = flow.drop_captions(config, key_drop, batch["text_lengths"])
    dropout = Dropout(lora.dropout, jax.random.fold_in(key_drop, 1)) if lora.rank and lora.dropout else None
    trees = networks(lora, params, frozen)
    by_sample = _sample_losses(model, trees, batch, lengths, t, noise, reduce_dtype, dropout)
    # One-hot rather than scattered: a scatter from sharded rows has no rule.
    in_bin = jnp.clip((t * NOISE_BINS).astype(jnp.int32), 0, NOISE_BINS - 1)[:, None] == jnp.arange(NOISE_BINS)
    sums = {
        "noise_bin_loss": jnp.sum(in_bin * by_sample[:, None], 0),
        "noise_bin_count": jnp.sum(in_bin, 0, dtype=jnp.float32),
    }
    return by_sample.mean(), sums


def networks(config: LoraConfig, params: Tree, frozen: Tree) -> tuple[Tree, Tree | None]:
    """(the denoiser's parameters, the adapter as `denoiser.apply` takes it) out of the trees of a state.

    With an adapter it is what is trained, and the parameters are among what is frozen; without one they are trained.
    """
    if not config.rank:
        return params["denoiser"], None
    return frozen["denoiser"], low_rank.scaled(params["lora"], config.scale)


def validation_loss(
    model: DenoiserConfig,
    config: FlowConfig,
    lora: LoraConfig,
    params: Tree,
    frozen: Tree,
    batch: Batch,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(sum of weight x loss, sum of weights) over the rows of a batch, whose `weight` [B] is 0 for repeated ones.

    At fixed quantiles of the noise levels, with noise from `key`: the same for every model.
    """
    latents = batch["latents"]
    key_order, key_noise = jax.random.split(key)
    # Shuffled, so that a noise level does not always meet the same row of the batch.
    t = jax.random.permutation(key_order, flow.noise_level_quantiles(config, len(latents), _image_tokens(batch)))
    t, noise = flow.by_rows(t, latents), flow.noise_like(key_noise, latents)
    by_sample = _sample_losses(model, networks(lora, params, frozen), batch, batch["text_lengths"], t, noise)
    return jnp.sum(by_sample * batch["weight"]), jnp.sum(batch["weight"])


def _sample_losses(
    model: DenoiserConfig,
    trees,
    batch: Batch,
    lengths,
    t,
    noise,
    reduce_dtype="compute",
    dropout: Dropout | None = None,
):
    n_image = batch.get("n_image")
    params, adapter = trees
    gather = functools.partial(parallel.gather, dtype=model.dtype, reduce_dtype=reduce_dtype)

    def denoise(x, t):
        inputs = batch["text"], lengths, t, batch["positions"]
        return denoiser.apply(model, params, x, *inputs, n_image, gather, adapter, dropout)

    return losses.velocity_loss(denoise, batch["latents"], t, noise, n_image)


def _image_tokens(batch: Batch) -> int | jax.Array:
    return batch.get("n_image", batch["latents"].shape[1])
