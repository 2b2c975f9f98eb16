"""Raw batches to what the step reads: captions to text features, pictures to latents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lens_jax import sharding
from lens_jax.models import codec
from lens_jax.models.codec import PixelCodecConfig
from lens_jax.models.layers import joint_positions
from lens_jax.text.encoder import TextEncoder


def encode_captions(encoder: TextEncoder, batch: dict) -> dict:
    """The host's half, run in the reading threads: `captions` become `text` [B, T, width] and `text_lengths` [B]."""
    features = encoder.encode(batch["captions"])
    return {
        "pixels": batch["pixels"],
        "text": features.layers,
        "text_lengths": features.lengths,
        **({"weight": batch["weight"]} if "weight" in batch else {}),
    }


def encode_pictures(
    config: PixelCodecConfig, codec_params: dict, batch: dict, mesh=None, padded: dict[int, int] | None = None
) -> dict:
    """The device's half: `pixels` uint8 [B, H, W, 3] become `latents` [B, N, C], and `positions` [N + T, 3] join.

    Args:
      batch: this process's rows; the result's are spread over `mesh`.
      padded: tokens of a picture -> tokens to pad to. Then `n_image`, those that are none, joins too.
    """
    batch = dict(batch)
    rows, columns = codec.latent_grid(config, *batch["pixels"].shape[1:3])
    tokens = rows * columns
    length = (padded or {}).get(tokens, tokens)
    batch["positions"] = _positions((rows, columns), batch["text"][0].shape[1], length)
    if padded is not None:
        batch["n_image"] = np.int32(tokens)
    batch = sharding.place_batch(batch, mesh)
    batch["latents"] = sharding.on(mesh, _encode)(config, length, codec_params, batch.pop("pixels"))
    return batch


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(config: PixelCodecConfig, length: int, codec_params: dict, pixels: jax.Array) -> jax.Array:
    latents = codec.encode(config, codec_params, codec.from_uint8(pixels))
    return jnp.pad(latents, ((0, 0), (0, length - latents.shape[1]), (0, 0)))


@functools.cache
def _positions(grid: tuple[int, int], text_tokens: int, length: int) -> np.ndarray:
    """Positions of the grid, of padding up to `length`, and of the text."""
    positions, tokens = joint_positions(*grid, text_tokens), grid[0] * grid[1]
    padding = np.zeros((length - tokens, 3), np.int32)
    return np.concatenate([positions[:tokens], padding, positions[tokens:]])
