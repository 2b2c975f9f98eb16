"""The FLUX.2 autoencoder of a release as the codec (report 2: frozen, latents of 16 x 16 pixels)."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lens_jax import flops, parallel
from lens_jax.encoders.images import CodecWeights
from lens_jax.models import autoencoder, tiled_decoder
from lens_jax.models.autoencoder import AutoencoderConfig

# Latent tokens that are decoded whole, of one image or of several at a time: 4.3 megapixels, twice the largest size of
# the release. At its sizes that takes 15 GB beside the weights in float32 and 11 GB in bfloat16 (3,584 and 2,561 bytes
# a pixel, of which tiles leave 1,331 in float32: XLA's own figures for 2048² on a CPU).
_LARGEST_WHOLE = 130 * 130


@dataclasses.dataclass(frozen=True)
class FluxCodecConfig:
    """The FLUX.2 autoencoder of a release as the codec (report 2: frozen, latents of 16 x 16 pixels)."""

    # A release folder, its conversion, or a file of weights.
    path: str = "checkpoints/Lens-Base"
    # Draw latents from the autoencoder's posterior instead of taking its mean. The report does not say which.
    sample: bool = False
    # Sizes, which must be those of the weights, and what it computes in.
    model: AutoencoderConfig = AutoencoderConfig()
    # Decode more than 4.3 megapixels in parts: images one after the other, and a larger one layer by layer in strips
    # (`models.tiled_decoder`), which is the same function in 0.37 of the memory and 1.3 of the operations.
    tiling: bool = True

    @property
    def latent_channels(self) -> int:
        return self.model.latent_channels

    @property
    def tile(self) -> int:
        return self.model.tile

    def load(self, mesh: Mesh | None = None) -> CodecWeights:
        from lens_jax.convert import load

        _, part = load.find_sized(self.path, "autoencoder", self.model, "codec")
        return CodecWeights(load.params(part, self.model, parallel.AUTOENCODER_RULES, mesh), part.digest())

    def fit(self, batches: Iterable[np.ndarray]) -> dict:
        return {}

    def abstract_fitted(self) -> dict:
        return {}

    def abstract_params(self, mesh: Any = None) -> dict:
        return parallel.abstract_params(autoencoder.abstract_params(self.model), parallel.AUTOENCODER_RULES, mesh)

    def encode(self, params: dict, images: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        return autoencoder.encode(self.model, params, images, noise)

    def decode(self, params: dict, latents: jax.Array, grid: tuple[int, int]) -> jax.Array:
        tokens, images = grid[0] * grid[1], latents.shape[0]
        if not self.tiling or images * tokens <= _LARGEST_WHOLE:
            return autoencoder.decode(self.model, params, latents, grid)
        if tokens > _LARGEST_WHOLE:
            return tiled_decoder.decode_tiled(self.model, params, latents, grid)
        at_once = max(n for n in range(1, _LARGEST_WHOLE // tokens + 1) if images % n == 0)
        groups = latents.reshape(-1, at_once, *latents.shape[1:])
        parts = jax.lax.map(lambda group: autoencoder.decode(self.model, params, group, grid), groups)
        return parts.reshape(images, *parts.shape[2:])

    def operations(self, grid: tuple[int, int]) -> int:
        return flops.autoencoder_encode(self.model, *grid)
