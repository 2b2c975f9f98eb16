"""MXFP4: weights of 4 bits with one power of two for every 32 of them (release: `text_encoder/`).

A matrix [out, in] is `blocks` uint8 [out, in / 32, 16] and `scales` uint8 [out, in / 32]. Byte k of a block holds input
2k in its low and 2k + 1 in its high nibble; a nibble is E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) and the
scale byte s is the factor 2^(s - 127). Weights stay packed in memory, 4.25 bits each, and are unpacked where they are
used: bfloat16 and float32 hold every value exactly.
"""

import jax
import jax.numpy as jnp

# Inputs that share a scale, and the bytes they take.
GROUP = 32
GROUP_BYTES = 16


def unpack(blocks: jax.Array, scales: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Even and odd inputs of packed weights: two arrays [..., out, in / 2] in `dtype`.

    Apart and not interleaved, because a product only has to split its other factor the same way, which is small, and
    interleaving 16 million weights on a CPU takes 20 times as long as unpacking them (82 ms against 4). Scale bytes 0
    and 255, which the format reserves in effect for zero and for not-a-number, give 0 and an infinity.
    """
    words = blocks.astype(jnp.uint32)
    factors = jax.lax.bitcast_convert_type(scales.astype(jnp.uint32) << 23, jnp.float32)[..., None]

    def values(nibbles):
        # Two exponent bits and one mantissa bit, moved to where float32 has its own: a table look-up is 2 times slower.
        magnitude = nibbles & 7
        normal = jax.lax.bitcast_convert_type((magnitude << 22) + (126 << 23), jnp.float32)
        value = jnp.where(magnitude < 2, jnp.where(magnitude == 1, 0.5, 0.0), normal)
        value = jnp.where(nibbles >= 8, -value, value) * factors
        return value.astype(dtype).reshape(*blocks.shape[:-2], -1)

    return values(words & 15), values(words >> 4)


def dequantise(blocks: jax.Array, scales: jax.Array, dtype=jnp.float32) -> jax.Array:
    """The weights [..., out, in] of blocks [..., out, in / 32, 16] and scales [..., out, in / 32]."""
    pair = jnp.stack(unpack(blocks, scales, dtype), axis=-1)
    return pair.reshape(*pair.shape[:-2], -1)


def matvec(x: jax.Array, blocks: jax.Array, scales: jax.Array) -> jax.Array:
    """Each row of x [n, in] times the transpose of packed weights of its own, [n, out, in / 32, 16]: float32 [n, out].

    As a sum of products and not as a matrix product, so that a compiler for GPUs unpacks the weights where it adds them
    up and reads 4.25 bits of each; a library's product would first need them written out, at four times as many.
    """
    even, odd = unpack(blocks, scales, jnp.float32)
    x = x.astype(jnp.float32)[:, None]
    return jnp.sum(even * x[..., 0::2] + odd * x[..., 1::2], -1)


def matmul(x: jax.Array, halves: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x [n, in] times the transpose of unpacked weights [out, in], float32 [n, out] with float32 sums.

    Weights first, because XLA's matrix product on a CPU is twice as fast with the tall factor on the left.
    """
    contract_last = (((1,), (1,)), ((), ()))
    product = lambda weights, half: jax.lax.dot_general(
        weights, half, contract_last, preferred_element_type=jnp.float32
    )
    return (product(halves[0], x[:, 0::2]) + product(halves[1], x[:, 1::2])).T
