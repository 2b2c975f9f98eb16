"""Flow matching as in section 3 of the report: noise levels, interpolation, velocity.

Convention: t is the noise level, 1 is pure noise and 0 is clean; x_t = (1 - t) x + t noise; velocity = noise - x.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lens_jax.errors import LensError
from lens_jax.models.layers import layout


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """The distribution of noise levels in training: t = sigmoid(mu + std z), mu linear in the image tokens."""

    # mu at 256 and at 4,096 image tokens; in between and beyond it is linear. 1,024 tokens give the report's 1.06.
    mu_256: float = 1.0
    mu_4096: float = 1.3
    # Standard deviation of the logit; the report does not state it, 1 is the usual value.
    std: float = 1.0
    # Share of captions dropped to no text at all, for guidance. The report does not state it.
    caption_dropout: float = 0.1

    def __post_init__(self):
        if not 0 <= self.caption_dropout < 1:
            raise LensError(f"flow.caption_dropout is {self.caption_dropout}; it must be at least 0 and below 1")
        if self.std <= 0:
            raise LensError(f"flow.std is {self.std}; it must be positive")


def noise_level_mu(config: FlowConfig, image_tokens: int | jax.Array) -> float | jax.Array:
    """Mean of the logit of t for a number of image tokens."""
    return config.mu_256 + (config.mu_4096 - config.mu_256) * (image_tokens - 256) / (4096 - 256)


def sample_noise_levels(config: FlowConfig, key: jax.Array, batch: int, image_tokens: int | jax.Array) -> jax.Array:
    """t [batch] in (0, 1), logit-normal."""
    logit = noise_level_mu(config, image_tokens) + config.std * jax.random.normal(key, (batch,))
    return jax.nn.sigmoid(logit)


def noise_level_quantiles(config: FlowConfig, batch: int, image_tokens: int | jax.Array) -> jax.Array:
    """The same distribution without chance: t [batch] at evenly spaced quantiles, for a validation loss."""
    quantiles = (jnp.arange(batch) + 0.5) / batch
    return jax.nn.sigmoid(noise_level_mu(config, image_tokens) + config.std * jax.scipy.special.ndtri(quantiles))


def drop_captions(config: FlowConfig, key: jax.Array, lengths: jax.Array) -> jax.Array:
    """Text lengths [B] with a share set to 0: no text at all, which is the unconditional case of the release."""
    return jnp.where(jax.random.bernoulli(key, config.caption_dropout, lengths.shape), 0, lengths)


def interpolate(clean: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Latents [B, N, C] at noise levels t [B]."""
    level = t[:, None, None]
    return (1 - level) * clean + level * noise


def noise_like(key: jax.Array, latents: jax.Array) -> jax.Array:
    """Noise laid out like latents [B, N, C], so that no device draws that of the others' rows.

    Drawn with the tokens first, so that padding comes last and a batch has the same noise with and without it.
    """
    rows, tokens, channels = latents.shape
    place = layout(latents)
    if place is not None:
        by_row, by_token, by_channel = (*place.spec, None, None, None)[:3]
        place = PartitionSpec(by_token, by_row, by_channel)
    return jax.random.normal(key, (tokens, rows, channels), out_sharding=place).swapaxes(0, 1)


def by_rows(x: jax.Array, latents: jax.Array) -> jax.Array:
    """A number a sample laid out like the samples: else every device would compute the modulation of all of them."""
    place = layout(latents)
    return x if place is None else jax.reshard(x, PartitionSpec(place.spec[0]))


def mean_of_tokens(x: jax.Array, n_image: jax.Array | None = None) -> jax.Array:
    """Mean a sample, float32 [B], of x [B, N, C] over its first `n_image` tokens; over all where that is None."""
    x = x.astype(jnp.float32)
    if n_image is None:
        return jnp.mean(x, axis=(1, 2))
    valid = jnp.arange(x.shape[1]) < n_image
    return jnp.sum(jnp.where(valid[:, None], x, 0), axis=(1, 2)) / (n_image * x.shape[2])
