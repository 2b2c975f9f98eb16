"""A codec without weights for images small enough to model as pixels.

The same contract as the autoencoder of the release: images in, normalised packed latents out, and back. It moves
`patch` x `patch` pixels into channels and normalises each channel with statistics fitted on the data set.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh

from lens_jax import parallel
from lens_jax.encoders.images import CodecWeights
from lens_jax.errors import LensError


@dataclasses.dataclass(frozen=True)
class PixelCodecConfig:
    """Sizes of the codec without weights."""

    # Side of the square of pixels that becomes one latent token.
    patch: int = 4

    # There is nothing to draw from.
    sample: ClassVar[bool] = False

    @property
    def latent_channels(self) -> int:
        return 3 * self.patch**2

    @property
    def tile(self) -> int:
        return self.patch

    def __post_init__(self):
        if self.patch < 1:
            raise LensError(f"codec.patch is {self.patch}; it must be at least 1")

    def load(self, mesh: Mesh | None = None) -> CodecWeights:
        return CodecWeights({}, None)

    def fit(self, batches: Iterable[np.ndarray]) -> dict:
        """Mean and standard deviation of each channel, float32 [latent_channels]."""
        count, total, squares = 0, 0.0, 0.0
        for batch in batches:
            packed = np.asarray(self._pack(batch.astype(np.float64) / 127.5 - 1)).reshape(-1, self.latent_channels)
            count += len(packed)
            total = total + packed.sum(0)
            squares = squares + np.square(packed).sum(0)
        if not count:
            raise LensError("the codec statistics need at least one batch of images")
        mean = total / count
        # A channel that never varies would divide by zero; 1e-4 is the variance floor of the release's autoencoder.
        std = np.sqrt(np.maximum(squares / count - np.square(mean), 0) + 1e-4)
        return {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}

    def abstract_fitted(self) -> dict:
        leaf = jax.ShapeDtypeStruct((self.latent_channels,), jnp.float32)
        return {"mean": leaf, "std": leaf}

    def abstract_params(self, mesh: Any = None) -> dict:
        return parallel.abstract_params(self.abstract_fitted(), parallel.AUTOENCODER_RULES, mesh)

    def encode(self, params: dict, images: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Channel order (c p1 p2), as in the release."""
        return (self._pack(images) - params["mean"]) / params["std"]

    def decode(self, params: dict, latents: jax.Array, grid: tuple[int, int]) -> jax.Array:
        packed = latents * params["std"] + params["mean"]
        sizes = {"h": grid[0], "w": grid[1], "p": self.patch, "q": self.patch}
        return rearrange(packed, "b (h w) (c p q) -> b (h p) (w q) c", **sizes)

    def operations(self, grid: tuple[int, int]) -> int:
        return 0

    def _pack(self, images):
        return rearrange(images, "b (h p) (w q) c -> b (h w) (c p q)", p=self.patch, q=self.patch)
