"""What every image codec does: images to normalised packed latents, and back.

A codec is a frozen dataclass (`ImageCodec`, tagged by its `kind` in JSON) whose methods are pure functions of itself
and its parameters. A new one is a file here and a name in `kinds.Images`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lens_jax.models.latent_grid import latent_grid


class CodecWeights(NamedTuple):
    """What a codec loads."""

    params: dict
    # Tells these weights from others; None where there are none.
    digest: str | None


class ImageCodec(Protocol):
    """Images [B, H, W, 3] in [-1, 1] to latents [B, N, latent_channels] and back."""

    # Draw latents from a distribution instead of taking its mean.
    sample: bool

    @property
    def latent_channels(self) -> int:
        """Channels of a latent token."""

    @property
    def tile(self) -> int:
        """Image sides must be a multiple of this many pixels, the side of a latent token."""

    def load(self, mesh: Mesh | None = None) -> CodecWeights:
        """Released weights, whole on every device of the mesh; none for a codec that is fitted to a data set."""

    def fit(self, batches: Iterable[np.ndarray]) -> dict:
        """Parameters fitted to uint8 images [B, H, W, 3], which are saved with a run; {} with released weights."""

    def abstract_fitted(self) -> dict:
        """Shapes and dtypes of `fit`."""

    def abstract_params(self, mesh: Any = None) -> dict:
        """Shapes, dtypes and, on a mesh, layouts of the parameters, whether loaded or fitted."""

    def encode(self, params: dict, images: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """images -> latents in the dtype of the images; `noise`, shaped like the result, where it is to sample."""

    def decode(self, params: dict, latents: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Latents of a grid of (rows, columns) -> images, nominally in [-1, 1]."""

    def operations(self, grid: tuple[int, int]) -> int:
        """Of `encode` for an image with such a grid, 2 a multiply-add."""


def from_uint8(images: jax.Array) -> jax.Array:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: jax.Array) -> jax.Array:
    """[-1, 1] -> uint8 [..., 3], truncated and not rounded, as the pipeline of the release does.

    A pixel that is not finite is magenta: as a number it would be black, which an image may be.
    """
    images = images.astype(jnp.float32)
    levels = ((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)
    return jnp.where(jnp.isfinite(images).all(-1, keepdims=True), levels, jnp.array([255, 0, 255], jnp.uint8))


def encode_rows(codec: ImageCodec, params: dict, pixels: jax.Array, key: jax.Array | None) -> jax.Array:
    """uint8 [B, H, W, 3] -> latents [B, N, C] in float32, for use inside a program; each device encodes its rows.

    `key` is used where the codec samples.
    """
    noise = None
    if codec.sample:
        rows, columns = latent_grid(codec, *pixels.shape[1:3])
        shape = (len(pixels), rows * columns, codec.latent_channels)
        meshless = jax.sharding.get_abstract_mesh().empty
        noise = jax.random.normal(key, shape, out_sharding=None if meshless else _rows(pixels))
    encode = lambda params, pixels, noise: codec.encode(params, from_uint8(pixels), noise)
    return _each_its_rows(encode, params, pixels, noise)


ImageKind = Literal["pil", "np"]


def decode_rows(
    codec: ImageCodec, kind: ImageKind, grid: tuple[int, int], params: dict, latents: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Latents [B, N, C] to images, uint8 ("pil") or float32 in [0, 1] ("np"), and which are finite, bool [B].

    For use inside a program: each device decodes its rows; on a mesh the result is then on every device, so that every
    process can read it.
    """

    def decode(params, latents):
        images = codec.decode(params, latents, grid)
        finite = jnp.isfinite(images).all((1, 2, 3)) & jnp.isfinite(latents).all((1, 2))
        return to_uint8(images) if kind == "pil" else (jnp.clip(images, -1, 1) + 1) / 2, finite

    results = _each_its_rows(decode, params, latents)
    return results if jax.sharding.get_abstract_mesh().empty else jax.reshard(results, PartitionSpec())


# The same as a program, its first three arguments static.
decode_program = functools.partial(jax.jit, static_argnums=(0, 1, 2))(decode_rows)


def _rows(x: jax.Array) -> PartitionSpec:
    return PartitionSpec(jax.typeof(x).sharding.spec[0])


def _each_its_rows(function: Callable, params: dict, *arrays: jax.Array | None) -> jax.Array:
    """`function(params, *arrays)` on the rows that each device of the mesh holds, if one is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return function(params, *arrays)
    rows = _rows(arrays[0])
    specs = (PartitionSpec(), *(None if x is None else rows for x in arrays))
    return jax.shard_map(function, in_specs=specs, out_specs=rows, check_vma=False)(params, *arrays)
