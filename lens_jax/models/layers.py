"""Parts the denoiser is made of: norms, rotary positions, timestep embedding, modulation."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, statistics in float32 as in the release (diffusers' RMSNorm).

    `features` is the width, or (..., width) for several norms side by side.
    """

    def __init__(self, features: int | tuple[int, ...], *, eps: float, rngs: nnx.Rngs):
        del rngs  # a norm starts at one
        self.scale = nnx.Param(jnp.ones(features))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return (x32 * inverse_rms).astype(x.dtype) * self.scale[...].astype(x.dtype)


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """LayerNorm without weights over the last axis, statistics in float32."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, -1, keepdims=True)
    variance = jnp.mean(jnp.square(x32 - mean), -1, keepdims=True)
    return ((x32 - mean) * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def scaled_layer_norm(x: jax.Array, params: dict, eps: float) -> jax.Array:
    """LayerNorm with a `scale` and a `bias` over the last axis, all of it in float32."""
    scaled = layer_norm(x.astype(jnp.float32), eps) * params["scale"].astype(jnp.float32)
    return (scaled + params["bias"].astype(jnp.float32)).astype(x.dtype)


def layout(x: jax.Array):
    """How `x` is sharded: where a product that sums over a sharded axis must put the sum. None without a mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else jax.typeof(x).sharding


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return x * (1 + scale) + shift


def timestep_frequencies(channels: int) -> np.ndarray:
    """10,000 ** (-2k / channels), float32 [channels / 2]: the exponent rounded as in the release, its power exactly.

    That exponent is up to 5.7e-7 of a frequency off, and angles are up to 1000 of it. Of 128 powers PyTorch's float32
    `exp` on a CPU (MKL's) rounds k = 12 and 106 to the other side, where the exact ones lie 0.48 units in the last
    place from ours, while it is right about closer ones: no formula gives that. It is most of what the two velocities
    differ by (docs/checkpoints.md).
    """
    half = channels // 2
    exponents = np.float32(-np.log(10_000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    return np.exp(exponents.astype(np.float64)).astype(np.float32)


def timestep_features(t: jax.Array, channels: int = 256) -> jax.Array:
    """Sinusoids of t [B] in [0, 1] -> float32 [B, channels], cosines first.

    The factor 1000 of the release is applied here and nowhere else: a caller that passes 0..1000 gets noise. It comes
    last, as there: 1000 t first would put a third of the angles an ulp away, up to 6e-5 radians.
    """
    angles = 1000.0 * (t.astype(jnp.float32)[:, None] * timestep_frequencies(channels))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def joint_positions(height: int, width: int, text_tokens: int) -> np.ndarray:
    """Positions (frame, row, column) of an image grid followed by its text, int32 [height * width + text_tokens, 3].

    The grid is centred: 64 rows are -32..31, 65 rows are -33..31. Text continues on all three axes from
    max(height // 2, width // 2), so it never shares a position with the image.
    """
    rows = np.arange(height) - (height - height // 2)
    columns = np.arange(width) - (width - width // 2)
    grid = np.stack(np.meshgrid([0], rows, columns, indexing="ij"), -1).reshape(-1, 3)
    text = max(height // 2, width // 2) + np.arange(text_tokens)
    return np.concatenate([grid, np.repeat(text[:, None], 3, 1)]).astype(np.int32)


def rotary_table(positions: jax.Array, axes: tuple[int, ...], theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [S, sum(axes) / 2] in float32 for positions [S, len(axes)].

    Each axis owns `axes[i] / 2` frequencies theta ** (-2k / axes[i]); the axes are laid side by side.
    """
    angles = [
        positions[:, i, None].astype(jnp.float32) * theta ** (-np.arange(0, dim, 2, dtype=np.float32) / dim)
        for i, dim in enumerate(axes)
    ]
    angles = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate neighbouring pairs (x[2k], x[2k+1]) of x [B, S, heads, head_dim] in float32 (not rotate-half)."""
    cos, sin = (part[None, :, None, :] for part in table)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
