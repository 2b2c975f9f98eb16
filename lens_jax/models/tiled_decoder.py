"""`autoencoder.decode` in a fraction of its memory, for images too large to decode at once.

Tiles of an image that are decoded apart come out otherwise than the image does, since every group norm takes its
statistics over all of it and the middle block attends to all of it; blending hides the seams and not the difference,
which was 1.3 to 1.8 %. So here the network is not run tile by tile but layer by layer: the middle block whole, at an
eighth of the resolution, and every convolution behind it in strips of rows, each read with the row above it and the one
below, with norms whose statistics are gathered over all strips beforehand. That is the same function, but for the order
in which statistics are summed.

What is kept of the image at a time is one activation a layer and no more: no upsampled one, whose convolution is done
again where it is read, and none in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lens_jax.models import autoencoder
from lens_jax.models.autoencoder import AutoencoderConfig, GroupNorm, Level, Residual

# Rows of cells in a strip at the resolution of the middle block, at most: 32 rows of pixels in the end.
_CELL_ROWS = 4

# (first row, count) -> rows [count, W, C]; what lies outside of the image is for the reader to leave out.
Rows = Callable[[jax.Array, int], jax.Array]


def decode_tiled(config: AutoencoderConfig, params: dict, latents: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Latents [B, N, latent_channels] of a grid of (rows, columns) -> images [B, H, W, 3], as `autoencoder.decode`.

    One image at a time. In float32 the two differ by 1e-6; in bfloat16 each is as far from that as the other
    (docs/checkpoints.md).
    """
    decoder = autoencoder.decoder_of(config, params)

    def one(latents):
        cells = autoencoder.cells_of(config, params, latents[None], grid)
        x = decoder.conv_in(decoder.post_quant(cells))
        with jax.named_scope("middle"):
            x = decoder.middle(x)[0]
        strip = max(rows for rows in range(1, _CELL_ROWS + 1) if x.shape[0] % rows == 0)
        height, rows = x.shape[0], _of_array(x)
        for i in range(len(decoder.levels)):
            level = decoder.levels[str(i)]
            with jax.named_scope(f"level{i}"):
                x = _level(level, rows, x, height, strip)
                rows = _of_array(x)
                if level.up is not None:
                    rows, height, strip = _upsampled(level.up, x), 2 * height, 2 * strip
        finish = _normed_conv(decoder.norm_out, decoder.conv_out, rows, height, strip)
        return _write(finish, jnp.broadcast_to(x[0, 0, 0], (height, x.shape[1] * height // x.shape[0], 3)), strip)

    return jax.lax.map(one, latents).astype(latents.dtype)


def _level(level: Level, rows: Rows, before: jax.Array, height: int, strip: int) -> jax.Array:
    """The residual blocks of a level on `rows` [height, W, C], computed from the array `before` where they are read."""
    x, y = _first_half(level.resnets["0"], rows, before, height, strip)
    x = _add(level.resnets["0"], x, y, strip)
    for j in range(1, level.depth):
        block = level.resnets[str(j)]
        y = _write(_normed_conv(block.norm1, block.conv1, _of_array(x), height, strip), y, strip)
        x = _add(block, x, y, strip)
    return x


def _first_half(block: Residual, rows: Rows, before: jax.Array, height: int, strip: int):
    """What a block has beside its convolutions, and between the two: both [H, W, C]."""
    first = _normed_conv(block.norm1, block.conv1, rows, height, strip)
    beside = lambda x: x if block.shortcut is None else block.shortcut(x)
    shape = height, before.shape[1] * height // before.shape[0], block.conv1.kernel.shape[-1]
    # Two numbers of which XLA does not know that they are the same, or it would make one buffer and copy it.
    buffers = tuple(jnp.broadcast_to(before[0, 0, k], shape) for k in range(2))

    def both(start):
        near = rows(start - 1, strip + 2)
        return beside(near[1:-1]), first(start, near)

    return _write(both, buffers, strip)


def _add(block: Residual, x: jax.Array, y: jax.Array, strip: int) -> jax.Array:
    """x and the second half of the block on y [H, W, C], in place: a strip of the sum needs of x that strip alone."""
    second = _normed_conv(block.norm2, block.conv2, _of_array(y), y.shape[0], strip)

    def step(i, x):
        part = jax.lax.dynamic_slice_in_dim(x, i * strip, strip) + second(i * strip)
        return jax.lax.dynamic_update_slice_in_dim(x, part, i * strip, axis=0)

    return jax.lax.fori_loop(0, y.shape[0] // strip, step, x)


def _write(function: Callable, buffers, strip: int):
    """`function(start)` -> arrays [strip, W, C], written over `buffers` [H, W, C].

    A loop that stacks its results, as `lax.map`, starts from zeros, which XLA makes once for all loops and copies.
    """

    def step(i, buffers):
        write = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, i * strip, axis=0)
        return jax.tree.map(write, buffers, function(i * strip))

    return jax.lax.fori_loop(0, jax.tree.leaves(buffers)[0].shape[0] // strip, step, buffers)


def _statistics(norm: GroupNorm, rows: Rows, height: int, strip: int) -> tuple[jax.Array, jax.Array]:
    """Those of the whole image. Strips are of one size, so its variance is theirs and that of their means."""
    means, variances = jax.lax.map(
        lambda start: norm.statistics(rows(start, strip)[None]), jnp.arange(0, height, strip)
    )
    mean = means.mean(0)
    return mean, variances.mean(0) + jnp.square(means - mean).mean(0)


def _of_array(x: jax.Array) -> Rows:
    return lambda first, count: x.take(jnp.clip(first + jnp.arange(count), 0, x.shape[0] - 1), axis=0)


def _upsampled(conv: nnx.Conv, x: jax.Array) -> Rows:
    """Of the convolution of x, doubled in both directions."""

    def rows(first, count):
        index = first - 1 + jnp.arange(count + 2)
        near = x.take(jnp.clip(index // 2, 0, x.shape[0] - 1), axis=0)
        return _convolve(conv, jnp.repeat(near, 2, axis=1), index, 2 * x.shape[0])

    return rows


def _normed_conv(norm: GroupNorm, conv: nnx.Conv, rows: Rows, height: int, strip: int) -> Callable:
    """`conv(silu(norm(x)))` as a function of the first of `strip` rows and, if they are there, the rows it needs."""
    statistics = _statistics(norm, rows, height, strip)

    def part(start, near=None):
        near = rows(start - 1, strip + 2) if near is None else near
        y = jax.nn.silu(norm.normalise(near[None], *statistics)[0])
        return _convolve(conv, y, start - 1 + jnp.arange(strip + 2), height)

    return part


def _convolve(conv: nnx.Conv, x: jax.Array, index: jax.Array, height: int) -> jax.Array:
    """A convolution of 3 x 3 on rows [n, W, C] of which `index` [n] says the places, to n - 2 rows.

    Outside of the image there are zeros.
    """
    x = jnp.where(((index >= 0) & (index < height))[:, None, None], x, 0)
    y = jax.lax.conv_general_dilated(
        x[None].astype(conv.dtype),
        conv.kernel[...].astype(conv.dtype),
        window_strides=(1, 1),
        padding=((0, 0), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y[0] + conv.bias[...].astype(conv.dtype)
