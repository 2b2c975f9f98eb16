"""Raw batches to what the step reads: captions to text features, pictures to latents."""

import functools

import jax
import numpy as np

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


def encode_pictures(config: PixelCodecConfig, codec_params: dict, batch: dict) -> dict:
    """The device's half: `pixels` uint8 [B, H, W, 3] become `latents` [B, N, C], and `positions` [N + T, 3] join."""
    batch = dict(batch)
    pixels = batch.pop("pixels")
    grid = codec.latent_grid(config, *pixels.shape[1:3])
    return {
        **batch,
        "latents": _encode(config, codec_params, pixels),
        "positions": _positions(grid, batch["text"][0].shape[1]),
    }


@functools.partial(jax.jit, static_argnums=0)
def _encode(config: PixelCodecConfig, codec_params: dict, pixels: jax.Array) -> jax.Array:
    return codec.encode(config, codec_params, codec.from_uint8(pixels))


@functools.cache
def _positions(grid: tuple[int, int], text_tokens: int) -> np.ndarray:
    return joint_positions(*grid, text_tokens)
