"""Attention for a TPU: JAX's splash kernel, with blocks that suit the length of the sequence."""

import jax
import jax.numpy as jnp

# The backward kernel with blocks of 1,536 needs more than the 16 MB that it gets on v5e.
_LARGEST = 1280
# A block of b x b scores takes about b² + _OVERHEAD b of the TPU's instructions.
_OVERHEAD = 288


def block(length: int) -> int:
    """The side of the blocks that a sequence of `length` is padded to, for the fewest instructions over all blocks.

    Larger ones cost less a score and more padding. By the TPU compiler's schedule (docs/benchmarks.md) a score of 1,280
    x 1,280 costs a fifth of what it does in JAX's blocks of 128.
    """
    cost = lambda side: (-(-length // side) * side) ** 2 * (1 + _OVERHEAD / side)
    return min(range(128, _LARGEST + 1, 128), key=cost)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None,
    name: str,
    side: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q kᵀ / sqrt(head_dim)) v [B, S, heads, head_dim] over the first `lengths` [B] keys of each row.

    A padded key is in another segment than the queries. The result and the sums of the softmax bear `name`, for
    `jax.checkpoint` to keep. Sequences are padded to whole blocks of `side` x `side`; 0 chooses.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    batch, length, heads, dim = q.shape
    side = side or block(length)
    padded = -(-length // side) * side
    lengths = jnp.full(batch, length, jnp.int32) if lengths is None else lengths
    fit = lambda x: jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)
    q, k, v = fit(q * dim**-0.5), fit(k), fit(v)
    everything = mask.MultiHeadMask([mask.FullMask((padded, padded))] * heads)
    attention = kernel.make_splash_mha(
        everything,
        head_shards=1,
        q_seq_shards=1,
        block_sizes=_blocks(side),
        residual_checkpoint_name=name,
        interpret=interpret,
    )

    def row(q, k, v, valid):
        keys = (jnp.arange(padded) >= valid).astype(jnp.int32)
        return attention(q, k, v, segment_ids=kernel.SegmentIds(q=jnp.zeros(padded, jnp.int32), kv=keys))

    return jax.vmap(row)(q, k, v, lengths).swapaxes(1, 2)[:, :length].astype(v.dtype)


def _blocks(side: int):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    # The forward kernel is better given 256 keys at a time, or 384; the backward one all. That gives all three
    # gradients at once: a third less than in two kernels, for a part of dq in memory for each block of keys.
    keys = next((part for part in (256, 384) if side % part == 0), side)
    forward = {"block_q": side, "block_kv": side, "block_kv_compute": keys}
    backward = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), side)
    return kernel.BlockSizes(**forward, **backward, use_fused_bwd_kernel=True)
