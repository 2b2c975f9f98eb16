"""Joint attention: one entry, a length a row instead of a mask."""

from typing import Literal

import jax

Kernel = Literal["auto", "xla", "cudnn"]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, kernel: Kernel = "auto") -> jax.Array:
    """softmax(q kᵀ / sqrt(head_dim)) v over the first `lengths[b]` keys of row b.

    q, k, v: [B, S, heads, head_dim] in the joint order image, text, padding, so that a length says everything a mask
    could; lengths: int32 [B], or None when every key is valid. Returns [B, S, heads, head_dim]. Rows of padded queries
    hold finite values that nothing reads. `auto` is cuDNN on a GPU in half precision and XLA elsewhere: cuDNN has no
    float32 kernel.
    """
    if kernel == "auto":
        half = q.dtype.itemsize == 2
        kernel = "cudnn" if half and jax.default_backend() == "gpu" else "xla"
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation=kernel)
