"""The autoencoder of the release, FLUX.2's AutoencoderKLFlux2 (release 2.2, 3.8): images to latents and back.

Inside, everything is NHWC. A latent token is `patch` x `patch` neighbouring cells of the encoder's output moved into
channels and normalised with fixed statistics. The contract is that of `models.codec`, so the two can be exchanged.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from lens_jax.errors import LensError
from lens_jax.models.latent_grid import latent_grid

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
# Scores of the middle block held at a time, 0.5 GB in float32: those of an image of 2048² would take 17 GB.
_SCORES = 2**27
_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder. The defaults are the release's: 84,046,115 parameters."""

    # Channels at each resolution, finest first; every one but the last is followed by a halving.
    widths: tuple[int, ...] = (128, 256, 512, 512)
    # Residual blocks a resolution on the way in; there is one more on the way out.
    layers: int = 2
    # Channels of the encoder's output (mean only).
    cell_channels: int = 32
    # Side of the square of cells that becomes one latent token.
    patch: int = 2
    # Groups of every group norm.
    groups: int = 32
    # Added to the variance of the latents before its root is taken. Not the 1e-5 that batch norms default to.
    latent_eps: float = 1e-4
    # What activations and convolutions are computed in; group norms and attention weights are in float32 throughout.
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    # What parameters are kept in; the latent statistics stay float32.
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @property
    def latent_channels(self) -> int:
        """Channels of a packed latent token."""
        return self.cell_channels * self.patch**2

    @property
    def tile(self) -> int:
        """Image sides must be a multiple of this many pixels, the side of a latent token."""
        return self.patch * 2 ** (len(self.widths) - 1)

    def __post_init__(self):
        for name in ("layers", "cell_channels", "patch", "groups"):
            if getattr(self, name) < 1:
                raise LensError(f"autoencoder.{name} is {getattr(self, name)}; it must be at least 1")
        if not self.widths or any(w < 1 or w % self.groups for w in self.widths):
            raise LensError(
                f"autoencoder.widths {self.widths} must be positive multiples of autoencoder.groups {self.groups}"
            )
        if not self.latent_eps > 0:
            raise LensError(f"autoencoder.latent_eps is {self.latent_eps}; it must be positive")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in FLOAT_DTYPES:
                raise LensError(f"autoencoder.{name} is {getattr(self, name)!r}; accepted: {', '.join(FLOAT_DTYPES)}")


class GroupNorm(nnx.Module):
    """Group norm over x [B, H, W, C] with statistics in float32, the variance in two passes (no cancellation)."""

    def __init__(self, c: AutoencoderConfig, channels: int, rngs: nnx.Rngs):
        del rngs  # a norm starts at one and zero
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.groups = c.groups

    def statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of each group of each image, float32 [B, 1, 1, groups, 1]."""
        grouped = self._grouped(x)
        mean = grouped.mean((1, 2, 4), keepdims=True)
        return mean, jnp.square(grouped - mean).mean((1, 2, 4), keepdims=True)

    def normalise(self, x: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
        normed = ((self._grouped(x) - mean) * jax.lax.rsqrt(variance + _NORM_EPS)).reshape(x.shape)
        return (normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)

    def _grouped(self, x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, -1)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.normalise(x, *self.statistics(x))


def _conv(c: AutoencoderConfig, inputs: int, outputs: int, rngs: nnx.Rngs, side: int = 3, strides=1, padding="SAME"):
    return nnx.Conv(
        inputs,
        outputs,
        (side, side),
        strides=strides,
        padding=padding,
        dtype=c.dtype,
        param_dtype=c.param_dtype,
        rngs=rngs,
    )


class Residual(nnx.Module):
    """Two normed convolutions beside a shortcut (diffusers: ResnetBlock2D without time embedding)."""

    def __init__(self, c: AutoencoderConfig, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(c, inputs, rngs)
        self.conv1 = _conv(c, inputs, outputs, rngs)
        self.norm2 = GroupNorm(c, outputs, rngs)
        self.conv2 = _conv(c, outputs, outputs, rngs)
        self.shortcut = _conv(c, inputs, outputs, rngs, side=1) if inputs != outputs else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """Every cell attends to every cell, one head as wide as the channels, with a residual."""

    def __init__(self, c: AutoencoderConfig, channels: int, rngs: nnx.Rngs):
        dense = functools.partial(nnx.Linear, channels, channels, dtype=c.dtype, param_dtype=c.param_dtype, rngs=rngs)
        self.norm = GroupNorm(c, channels, rngs)
        self.q, self.k, self.v, self.out = dense(), dense(), dense(), dense()

    def __call__(self, x: jax.Array) -> jax.Array:
        cells = rearrange(self.norm(x), "b h w c -> b (h w) c")
        q, k, v = self.q(cells), self.k(cells), self.v(cells)

        def attend(q):
            scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
            return jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(scores).astype(v.dtype), v)

        queries = max(1, _SCORES // (k.shape[0] * k.shape[1]))
        if q.shape[1] <= queries:
            y = attend(q)
        else:
            # Rows of a softmax do not see each other, so a part of the queries at a time changes no result.
            row = lambda one: attend(one[:, None])[:, 0]
            y = jax.lax.map(row, q.swapaxes(0, 1), batch_size=queries).swapaxes(0, 1)
        return x + self.out(y).reshape(x.shape)


class Middle(nnx.Module):
    """Residual, attention, residual at the coarsest resolution."""

    def __init__(self, c: AutoencoderConfig, channels: int, rngs: nnx.Rngs):
        self.resnets = nnx.Dict({str(i): Residual(c, channels, channels, rngs) for i in range(2)})
        self.attention = Attention(c, channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.resnets["1"](self.attention(self.resnets["0"](x)))


class Level(nnx.Module):
    """Residual blocks at one resolution, then a convolution that halves or doubles it, or neither."""

    def __init__(self, c: AutoencoderConfig, sizes: tuple[int, ...], resample: str | None, rngs: nnx.Rngs):
        self.resnets = nnx.Dict({str(i): Residual(c, *sizes[i : i + 2], rngs) for i in range(len(sizes) - 1)})
        # Keys of a checkpoint are text, and in this dict they are walked in the order of their numbers.
        self.depth = len(sizes) - 1
        # One row below and one column right, none above and left: the padding of the release is not symmetric.
        down = lambda: _conv(c, sizes[-1], sizes[-1], rngs, strides=2, padding=((0, 1), (0, 1)))
        self.down = down() if resample == "down" else None
        self.up = _conv(c, sizes[-1], sizes[-1], rngs) if resample == "up" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.depth):
            x = self.resnets[str(i)](x)
        if self.down is not None:
            x = self.down(x)
        if self.up is not None:
            x = self.up(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return x


class Encoder(nnx.Module):
    """images [B, H, W, 3] -> mean and log variance of the cells [B, H/8, W/8, 2 * cell_channels]."""

    def __init__(self, c: AutoencoderConfig, rngs: nnx.Rngs):
        last = len(c.widths) - 1
        inputs = (c.widths[0], *c.widths)
        self.conv_in = _conv(c, 3, c.widths[0], rngs)
        self.levels = nnx.Dict(
            {
                str(i): Level(c, (inputs[i],) + (w,) * c.layers, "down" if i < last else None, rngs)
                for i, w in enumerate(c.widths)
            }
        )
        self.middle = Middle(c, c.widths[-1], rngs)
        self.norm_out = GroupNorm(c, c.widths[-1], rngs)
        self.conv_out = _conv(c, c.widths[-1], 2 * c.cell_channels, rngs)
        self.quant = _conv(c, 2 * c.cell_channels, 2 * c.cell_channels, rngs, side=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for i in range(len(self.levels)):
            with jax.named_scope(f"level{i}"):
                x = self.levels[str(i)](x)
        with jax.named_scope("middle"):
            x = self.middle(x)
        return self.quant(self.conv_out(jax.nn.silu(self.norm_out(x))))


class Decoder(nnx.Module):
    """cells [B, h, w, cell_channels] -> images [B, 8h, 8w, 3]; its levels run from coarse to fine."""

    def __init__(self, c: AutoencoderConfig, rngs: nnx.Rngs):
        widths = c.widths[::-1]
        last = len(widths) - 1
        inputs = (widths[0], *widths)
        self.post_quant = _conv(c, c.cell_channels, c.cell_channels, rngs, side=1)
        self.conv_in = _conv(c, c.cell_channels, widths[0], rngs)
        self.middle = Middle(c, widths[0], rngs)
        self.levels = nnx.Dict(
            {
                str(i): Level(c, (inputs[i],) + (w,) * (c.layers + 1), "up" if i < last else None, rngs)
                for i, w in enumerate(widths)
            }
        )
        self.norm_out = GroupNorm(c, widths[-1], rngs)
        self.conv_out = _conv(c, widths[-1], 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(self.post_quant(x))
        with jax.named_scope("middle"):
            x = self.middle(x)
        for i in range(len(self.levels)):
            with jax.named_scope(f"level{i}"):
                x = self.levels[str(i)](x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


@functools.cache
def _declared(config: AutoencoderConfig):
    """(static half, abstract parameters) of the two modules; building them costs a trace, so once a config."""
    modules = [nnx.eval_shape(lambda cls=cls: cls(config, nnx.Rngs(0))) for cls in (Encoder, Decoder)]
    return [(nnx.graphdef(module), nnx.to_pure_dict(nnx.state(module))) for module in modules]


def init(config: AutoencoderConfig, key: jax.Array) -> dict:
    """Fresh parameters as a nested dict in `config.param_dtype`; the latent statistics are those of unit variance.

    Kernels are uniform up to 1 / sqrt(inputs of one output), as PyTorch's, all cut from one draw: a hundred draws, one
    for each as the modules would make them, take a CPU half a minute to compile.
    """
    declared = [params for _, params in _declared(config)]
    leaves, tree = jax.tree_util.tree_flatten_with_path(declared)
    is_kernel = lambda path: path[-1].key == "kernel"
    draw = jax.random.uniform(key, (sum(leaf.size for path, leaf in leaves if is_kernel(path)),), minval=-1.0)
    fresh, start = [], 0
    for path, leaf in leaves:
        if is_kernel(path):
            value = draw[start : start + leaf.size].reshape(leaf.shape) * math.prod(leaf.shape[:-1]) ** -0.5
            start += leaf.size
        else:
            value = jnp.full(leaf.shape, float(path[-1].key == "scale"))
        fresh.append(value.astype(config.param_dtype))
    encoder, decoder = tree.unflatten(fresh)
    statistics = {
        "mean": jnp.zeros(config.latent_channels, jnp.float32),
        "variance": jnp.ones(config.latent_channels, jnp.float32),
        # Batches the statistics were gathered over. Nothing reads it, but it is part of the release's file.
        "batches": jnp.zeros((), jnp.int32),
    }
    return {"encoder": encoder, "decoder": decoder, "latent_statistics": statistics}


def abstract_params(config: AutoencoderConfig) -> dict:
    """Shapes and dtypes of `init` without allocating anything."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def parameter_count(config: AutoencoderConfig) -> int:
    """Trained parameters; the latent statistics are none."""
    params = abstract_params(config)
    return sum(leaf.size for leaf in jax.tree.leaves((params["encoder"], params["decoder"])))


def posterior(config: AutoencoderConfig, params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log variance of the cells of images [B, H, W, 3] in [-1, 1], each float32 [B, H/8, W/8, cell_channels].

    Not packed and not normalised: diffusers' `vae.encode(x).latent_dist`, channels last.
    """
    latent_grid(config, *images.shape[1:3])  # raises what an einops error would say less well
    encoder = nnx.merge(_declared(config)[0][0], params["encoder"])
    moments = encoder(images.astype(config.dtype)).astype(jnp.float32)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)


def encode(config: AutoencoderConfig, params: dict, images: jax.Array, noise: jax.Array | None = None) -> jax.Array:
    """images [B, H, W, 3] in [-1, 1] -> normalised packed latents [B, N, latent_channels], channel order (c p1 p2).

    The mean of the posterior, or a sample of it where `noise`, standard normal and shaped like the result, is given.
    In the dtype of `images`. Raises LensError unless H and W are multiples of `config.tile`.
    """
    p = config.patch
    pack = lambda cells: rearrange(cells, "b (h p) (w q) c -> b (h w) (c p q)", p=p, q=p)
    packed, log_variance = map(pack, posterior(config, params, images))
    if noise is not None:
        packed = packed + jnp.exp(0.5 * log_variance) * noise
    mean, std = _statistics(config, params)
    return ((packed - mean) / std).astype(images.dtype)


def decode(config: AutoencoderConfig, params: dict, latents: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Latents [B, N, latent_channels] of a grid of (rows, columns) -> images [B, H, W, 3], nominally in [-1, 1].

    In the dtype of `latents`. The latents are put back to scale in float32, where the release rounds the scale to its
    own dtype first: in bfloat16 that is the smaller error.
    """
    decoder = decoder_of(config, params)
    return decoder(cells_of(config, params, latents, grid)).astype(latents.dtype)


def decoder_of(config: AutoencoderConfig, params: dict) -> Decoder:
    """The module with its parameters, for those who run its parts in another way (`models.tiled_decoder`)."""
    return nnx.merge(_declared(config)[1][0], params["decoder"])


def cells_of(config: AutoencoderConfig, params: dict, latents: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Latents [B, N, latent_channels] as what a decoder takes: cells [B, h, w, cell_channels] in `config.dtype`."""
    mean, std = _statistics(config, params)
    packed = latents.astype(jnp.float32) * std + mean
    p = config.patch
    cells = rearrange(packed, "b (h w) (c p q) -> b (h p) (w q) c", h=grid[0], w=grid[1], p=p, q=p)
    return cells.astype(config.dtype)


def _statistics(config: AutoencoderConfig, params: dict) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the packed latents, float32 [latent_channels]."""
    statistics = params["latent_statistics"]
    return statistics["mean"], jnp.sqrt(statistics["variance"] + config.latent_eps)
