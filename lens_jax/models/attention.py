"""Joint attention: one entry, a length a row instead of a mask, on whatever mesh its inputs are laid out."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

Kernel = Literal["auto", "xla", "blocked", "cudnn", "splash"]

# Attention scores that `blocked` has at a time: 8 MB in float32, which caches hold.
_SCORES = 2**21


def resolve(kernel: Kernel, dtype, platform: str) -> Kernel:
    """The kernel to use on a platform ("cpu", "gpu" or "cuda", "tpu"): what `auto` stands for there."""
    if kernel != "auto":
        return kernel
    gpu = "cudnn" if jnp.dtype(dtype).itemsize == 2 else "xla"
    return {"cpu": "blocked", "gpu": gpu, "cuda": gpu, "tpu": "splash"}.get(platform, "xla")


def attend(
    image: tuple[jax.Array, jax.Array, jax.Array],
    text: tuple[jax.Array, jax.Array, jax.Array],
    lengths: jax.Array | None,
    n_image: jax.Array | None = None,
    kernel: Kernel = "auto",
) -> tuple[jax.Array, jax.Array]:
    """softmax(q kᵀ / sqrt(head_dim)) v of image and text together: (image [B, N, heads, head_dim], text [B, T, ...]).

    The joint order is image, text, padding, so that a length says everything a mask could.

    Args:
      image, text: queries, keys and values [B, N or T, heads, head_dim] of the two.
      lengths: int32 [B] valid keys in the joint order, or None when every key is valid.
      n_image: int32 scalar, image tokens that are no padding: the text is then written behind them, and one program
        serves every shape of at most N tokens. None when all N are.
      kernel: `auto` is cuDNN on a GPU in half precision, splash on a TPU, blocked on a CPU and XLA elsewhere. cuDNN has
        no float32.

    Padded queries give finite values that nothing may read. Rows and heads may be sharded; a sharded sequence is
    exchanged for sharded heads on the way in and back on the way out (DeepSpeed-Ulysses). The kernel itself always
    runs inside `shard_map`: outside of one, cuDNN's result would be declared replicated (JAX 0.10.2).
    """
    inner = functools.partial(_attend, kernel=resolve(kernel, image[0].dtype, jax.default_backend()))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return inner(image, text, lengths, n_image)
    outside = tuple(_spec(parts[0]) for parts in (image, text))
    inside = _heads_for_sequence(outside[0])
    image, text = (tuple(jax.reshard(x, inside) for x in parts) for parts in (image, text))
    qkv, rows = (inside,) * 3, PartitionSpec(inside[0])
    specs = (qkv, qkv, None if lengths is None else rows, None if n_image is None else PartitionSpec())
    mixed = jax.shard_map(inner, in_specs=specs, out_specs=(inside, inside), check_vma=False)(
        image, text, lengths, n_image
    )
    return tuple(jax.reshard(x, spec) for x, spec in zip(mixed, outside))


def _attend(image, text, lengths, n_image, kernel):
    n, t = image[0].shape[1], text[0].shape[1]
    if n_image is None:
        join = lambda pair: jnp.concatenate(pair, axis=1)
    else:
        # Room for the text behind any number of image tokens; what is left of the padding comes after it.
        room = lambda x: jnp.pad(x, ((0, 0), (0, t), (0, 0), (0, 0)))
        join = lambda pair: jax.lax.dynamic_update_slice_in_dim(room(pair[0]), pair[1], n_image, 1)
    q, k, v = (join(pair) for pair in zip(image, text))
    mixed = _KERNELS[kernel](q, k, v, lengths)
    start = n if n_image is None else n_image
    return mixed[:, :n], jax.lax.dynamic_slice_in_dim(mixed, start, t, 1)


def _library(q, k, v, lengths, implementation):
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation=implementation)


def _blocked(q, k, v, lengths):
    """Heads one after another, each in parts of its queries, so that scores stay in the caches of a CPU.

    Faster than all scores at once, and at two rows of 4,224 tokens (1024 x 1024) 0.18 GB in place of 6.9. Where there
    are few, all at once is faster. The backward pass computes the scores again rather than keep them.
    """
    batch, length, heads, dim = q.shape
    if batch * heads * length**2 <= _SCORES:
        return _library(q, k, v, lengths, "xla")
    parts = -(-length // max(1, _SCORES // length))
    rows = -(-length // parts)
    q = jnp.pad(q * jnp.asarray(dim**-0.5, q.dtype), ((0, 0), (0, parts * rows - length), (0, 0), (0, 0)))
    q = rearrange(q, "b (part row) h d -> (b h) part row d", part=parts)
    k, v = rearrange(k, "b s h d -> (b h) d s"), rearrange(v, "b s h d -> (b h) s d")
    lengths = jnp.repeat(jnp.full(batch, length) if lengths is None else jnp.asarray(lengths), heads)

    def head(inputs):
        q, k, v, valid = inputs

        @jax.checkpoint
        def part(q):
            scores = jnp.matmul(q, k, preferred_element_type=jnp.float32)
            scores = jnp.where(jnp.arange(length) < valid, scores, -1e30)
            weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
            mixed = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return (mixed / jnp.sum(weights, -1, keepdims=True)).astype(v.dtype)

        return jax.lax.map(part, q)

    mixed = jax.lax.map(head, (q, k, v, lengths))
    return rearrange(mixed, "(b h) part row d -> b (part row) h d", b=batch)[:, :length]


def _splash(q, k, v, lengths, interpret: bool = False):
    """TPU kernel; a padded key is in another segment than the queries. Sequences are padded to its blocks of 128."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    batch, length, heads, dim = q.shape
    padded = -(-length // 128) * 128
    lengths = jnp.full(batch, length, jnp.int32) if lengths is None else lengths
    fit = lambda x: jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)
    q, k, v = fit(q * dim**-0.5), fit(k), fit(v)
    everything = mask.MultiHeadMask([mask.FullMask((padded, padded))] * heads)
    attention = kernel.make_splash_mha(everything, head_shards=1, q_seq_shards=1, interpret=interpret)

    def row(q, k, v, valid):
        keys = (jnp.arange(padded) >= valid).astype(jnp.int32)
        return attention(q, k, v, segment_ids=kernel.SegmentIds(q=jnp.zeros(padded, jnp.int32), kv=keys))

    return jax.vmap(row)(q, k, v, lengths).swapaxes(1, 2)[:, :length].astype(v.dtype)


_KERNELS = {
    "xla": functools.partial(_library, implementation="xla"),
    "blocked": _blocked,
    "cudnn": functools.partial(_library, implementation="cudnn"),
    "splash": _splash,
}


def _spec(x: jax.Array) -> PartitionSpec:
    """How a value is laid out, with an entry for every axis."""
    spec = jax.typeof(x).sharding.spec
    return PartitionSpec(*spec, *(None,) * (x.ndim - len(spec)))


def _heads_for_sequence(spec: PartitionSpec) -> PartitionSpec:
    """[B, S, heads, head_dim] with the mesh axes of S moved to the heads."""
    names = lambda entry: () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    heads = names(spec[2]) + names(spec[1])
    return PartitionSpec(spec[0], None, heads or None, spec[3])
