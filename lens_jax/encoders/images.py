"""Pixels as numbers, for whatever codec is in front of the denoiser."""

import jax
import jax.numpy as jnp


def from_uint8(images: jax.Array) -> jax.Array:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: jax.Array) -> jax.Array:
    """[-1, 1] -> uint8, truncated and not rounded, as the pipeline of the release does."""
    return ((jnp.clip(images.astype(jnp.float32), -1, 1) + 1) * 127.5).astype(jnp.uint8)
