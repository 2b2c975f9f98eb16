"""A codec without parameters for images small enough to model as pixels.

The same contract as the autoencoder of the release: images in, normalised packed latents out, and back. It moves
`patch` x `patch` pixels into channels and normalises each channel with statistics fitted on the data set.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from lens_jax.errors import LensError


@dataclasses.dataclass(frozen=True)
class PixelCodecConfig:
    """Sizes of the parameter-free codec."""

    # Side of the square of pixels that becomes one latent token.
    patch: int = 4

    @property
    def latent_channels(self) -> int:
        return 3 * self.patch**2

    @property
    def tile(self) -> int:
        """Image sides must be a multiple of this many pixels."""
        return self.patch

    def __post_init__(self):
        if self.patch < 1:
            raise LensError(f"codec.patch is {self.patch}; it must be at least 1")


def encode(config: PixelCodecConfig, params: dict, images: jax.Array) -> jax.Array:
    """images [B, H, W, 3] in [-1, 1] -> normalised packed latents [B, N, latent_channels], channel order (c p1 p2)."""
    return (_pack(config, images) - params["mean"]) / params["std"]


def decode(config: PixelCodecConfig, params: dict, latents: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Latents [B, N, latent_channels] of a grid of (rows, columns) -> images [B, H, W, 3], nominally in [-1, 1]."""
    packed = latents * params["std"] + params["mean"]
    return rearrange(packed, "b (h w) (c p q) -> b (h p) (w q) c", h=grid[0], w=grid[1], p=config.patch, q=config.patch)


def fit(config: PixelCodecConfig, batches: Iterable[np.ndarray]) -> dict:
    """Per-channel mean and standard deviation of uint8 image batches [B, H, W, 3], float32 [latent_channels]."""
    count, total, squares = 0, 0.0, 0.0
    for batch in batches:
        packed = np.asarray(_pack(config, batch.astype(np.float64) / 127.5 - 1)).reshape(-1, config.latent_channels)
        count += len(packed)
        total = total + packed.sum(0)
        squares = squares + np.square(packed).sum(0)
    if not count:
        raise LensError("the codec statistics need at least one batch of images")
    mean = total / count
    # A channel that never varies would divide by zero; 1e-4 is the variance floor of the release's autoencoder.
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0) + 1e-4)
    return {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}


def abstract_params(config: PixelCodecConfig) -> dict:
    """Shapes and dtypes of `fit`."""
    leaf = jax.ShapeDtypeStruct((config.latent_channels,), jnp.float32)
    return {"mean": leaf, "std": leaf}


def _pack(config: PixelCodecConfig, images):
    return rearrange(images, "b (h p) (w q) c -> b (h w) (c p q)", p=config.patch, q=config.patch)
