"""The FLUX.2 autoencoder of a release as the codec (report 2: frozen, latents of 16 x 16 pixels)."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lens_jax import flops, parallel
from lens_jax.encoders.images import CodecWeights
from lens_jax.models import autoencoder
from lens_jax.models.autoencoder import AutoencoderConfig

# Latent tokens along a side up to which an image is decoded whole: 2,080 pixels, the longest side of the release's
# larger table.
_LARGEST_UNTILED = 130


@dataclasses.dataclass(frozen=True)
class FluxCodecConfig:
    """The FLUX.2 autoencoder of a release as the codec (report 2: frozen, latents of 16 x 16 pixels)."""

    # A release folder, its conversion, or a file of weights.
    path: str = "checkpoints/Lens-Base"
    # Draw latents from the autoencoder's posterior instead of taking its mean. The report does not say which.
    sample: bool = False
    # Sizes, which must be those of the weights, and what it computes in.
    model: AutoencoderConfig = AutoencoderConfig()

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
        decode = autoencoder.decode_tiled if max(grid) > _LARGEST_UNTILED else autoencoder.decode
        return decode(self.model, params, latents, grid)

    def operations(self, grid: tuple[int, int]) -> int:
        return flops.autoencoder_encode(self.model, *grid)
