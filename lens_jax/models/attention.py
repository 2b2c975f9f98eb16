"""Joint attention: one entry, a length a row instead of a mask, on whatever mesh its inputs are laid out."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lens_jax.models import attention_cpu, attention_tpu

Kernel = Literal["auto", "xla", "blocked", "cudnn", "splash"]

# What the backward pass is better given than has to compute again: results by this name, or of cuDNN's forward pass. A
# fused kernel keeps the sums of its softmax besides.
SAVED = ("attention", "dot_product_attention_fwd_wrapper")


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


def _xla(q, k, v, lengths):
    return checkpoint_name(_library(q, k, v, lengths, "xla"), SAVED[0])


def _cudnn(q, k, v, lengths):
    return _library(q, k, v, lengths, "cudnn")


def _library(q, k, v, lengths, implementation):
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation=implementation)


def _blocked(q, k, v, lengths):
    return checkpoint_name(attention_cpu.blocked(q, k, v, lengths), SAVED[0])


def _splash(q, k, v, lengths):
    return attention_tpu.splash(q, k, v, lengths, name=SAVED[0])


_KERNELS = {"xla": _xla, "blocked": _blocked, "cudnn": _cudnn, "splash": _splash}


def _spec(x: jax.Array) -> PartitionSpec:
    """How a value is laid out, with an entry for every axis."""
    spec = jax.typeof(x).sharding.spec
    return PartitionSpec(*spec, *(None,) * (x.ndim - len(spec)))


def _heads_for_sequence(spec: PartitionSpec) -> PartitionSpec:
    """[B, S, heads, head_dim] with the mesh axes of S moved to the heads."""
    names = lambda entry: () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    heads = names(spec[2]) + names(spec[1])
    return PartitionSpec(spec[0], None, heads or None, spec[3])
