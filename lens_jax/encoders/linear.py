"""A linear codec for images too small for an autoencoder: squares of pixels on their leading principal components.

The same contract as the autoencoder of the release: images in, normalised packed latents out, and back. It is fitted to
the data set in one pass. All components share one scale: scaled to unit variance each, the faint ones, which are grain,
would be learned as eagerly as the strong ones, and the edges of the squares show in samples.
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
class LinearCodecConfig:
    """Sizes of the linear codec."""

    # Side of the square of pixels that becomes one latent token.
    patch: int = 8
    # Principal components kept of its 3 patch² numbers, the channels of a token. All of them lose nothing.
    components: int = 64

    # There is nothing to draw from.
    sample: ClassVar[bool] = False

    @property
    def latent_channels(self) -> int:
        return self.components

    @property
    def tile(self) -> int:
        return self.patch

    def __post_init__(self):
        if self.patch < 1:
            raise LensError(f"codec.patch is {self.patch}; it must be at least 1")
        if not 1 <= self.components <= self._pixels:
            raise LensError(f"codec.components is {self.components}; it must be from 1 to 3 patch² = {self._pixels}")

    @property
    def _pixels(self) -> int:
        return 3 * self.patch**2

    def load(self, mesh: Mesh | None = None) -> CodecWeights:
        return CodecWeights({}, None)

    def fit(self, batches: Iterable[np.ndarray]) -> dict:
        """`basis` float32 [3 patch², components], orthonormal columns; `mean` [3 patch²]; `scale` [1], the root of the
        mean variance of the components. In memory: one batch, and the covariance in float64."""
        count, total, products = 0, 0.0, 0.0
        for batch in batches:
            packed = np.asarray(self._pack(batch.astype(np.float64) / 127.5 - 1)).reshape(-1, self._pixels)
            count += len(packed)
            total = total + packed.sum(0)
            products = products + packed.T @ packed
        if not count:
            raise LensError("the codec's components need at least one batch of images")
        mean = total / count
        variances, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
        basis = vectors[:, ::-1][:, : self.components]
        # An eigenvector's sign is arbitrary: the largest entry of each is positive, on every machine.
        largest = np.take_along_axis(basis, np.abs(basis).argmax(0)[None], axis=0)
        kept = np.maximum(variances[::-1][: self.components], 0)
        # 1e-4 is the variance floor of the release's autoencoder; images of one colour have none.
        scale = np.sqrt(kept.mean() + 1e-4)
        return {
            "basis": (basis * np.where(largest < 0, -1, 1)).astype(np.float32),
            "mean": mean.astype(np.float32),
            "scale": np.array([scale], np.float32),
        }

    def abstract_fitted(self) -> dict:
        leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        return {"basis": leaf(self._pixels, self.components), "mean": leaf(self._pixels), "scale": leaf(1)}

    def abstract_params(self, mesh: Any = None) -> dict:
        return parallel.abstract_params(self.abstract_fitted(), parallel.AUTOENCODER_RULES, mesh)

    def encode(self, params: dict, images: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        centred = self._pack(images) - params["mean"]
        return jnp.matmul(centred, params["basis"], precision="highest") / params["scale"]

    def decode(self, params: dict, latents: jax.Array, grid: tuple[int, int]) -> jax.Array:
        packed = jnp.matmul(latents * params["scale"], params["basis"].T, precision="highest") + params["mean"]
        sizes = {"h": grid[0], "w": grid[1], "p": self.patch, "q": self.patch}
        return rearrange(packed, "b (h w) (c p q) -> b (h p) (w q) c", **sizes)

    def operations(self, grid: tuple[int, int]) -> int:
        return 2 * grid[0] * grid[1] * self._pixels * self.components

    def _pack(self, images):
        return rearrange(images, "b (h p) (w q) c -> b (h w) (c p q)", p=self.patch, q=self.patch)
