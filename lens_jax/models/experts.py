"""The mixture of experts of GPT-OSS: 32 SwiGLU networks a layer, of which every token uses four.

Their weights stay packed (`mxfp4`) and are unpacked where they are used: one expert of one layer at a time, or, for the
few tokens of a decoding step on a GPU, those of all tokens within the sum itself.
"""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from lens_jax.models import mxfp4

if TYPE_CHECKING:
    from lens_jax.models.gpt_oss import GptOssConfig

# On a GPU so few tokens meet their experts at once: those of one decoding step. On a CPU, at full width in bfloat16,
# that took 5 times as long for one token and 13 for four.
FEW_TOKENS = 8


def mixture(config: "GptOssConfig", params: dict, layer: jax.Array, x: jax.Array, valid: jax.Array) -> jax.Array:
    """The experts of one layer: float32 [n, width] for tokens x [n, width]; rows that are not `valid` give zero."""
    router = params["router"]
    scores = jnp.dot(x, router["kernel"][layer].astype(x.dtype), preferred_element_type=jnp.float32)
    scores, chosen = jax.lax.top_k(scores + router["bias"][layer].astype(jnp.float32), config.experts_per_token)
    weights = jnp.where(valid[:, None], jax.nn.softmax(scores), 0)
    in_turn = functools.partial(experts_in_turn, config, params["experts"])
    if len(x) > FEW_TOKENS:
        return in_turn(layer, x, valid, weights, chosen)
    gathered = functools.partial(gathered_experts, config, params["experts"])
    return jax.lax.platform_dependent(layer, x, valid, weights, chosen, cuda=gathered, rocm=gathered, default=in_turn)


def gathered_experts(config: "GptOssConfig", experts: dict, layer, x, valid, weights, chosen) -> jax.Array:
    """`mixture` for the few tokens of a decoding step: each with its own experts, all at once, no loop and no branch.

    On a GPU a loop or a branch that depends on numbers there waits for the host, up to 4 n times a layer.
    """
    c, (n, width) = config, x.shape
    each = chosen.reshape(-1)

    def by_its_own(p: dict, rows: jax.Array) -> jax.Array:
        if "kernel" in p:
            kernel = p["kernel"][layer, each].astype(rows.dtype)
            out = jnp.einsum("nw,nwo->no", rows, kernel, preferred_element_type=jnp.float32)
        else:
            out = mxfp4.matvec(rows, p["blocks"][layer, each], p["scales"][layer, each])
        return out + p["bias"][layer, each].astype(jnp.float32)

    hidden = swiglu(c, by_its_own(experts["gate_up"], jnp.repeat(x, c.experts_per_token, 0))).astype(x.dtype)
    results = by_its_own(experts["down"], hidden).reshape(n, c.experts_per_token, width)
    return jnp.einsum("nk,nkw->nw", weights, results)


def experts_in_turn(config: "GptOssConfig", experts: dict, layer, x, valid, weights, chosen) -> jax.Array:
    """`mixture` for any number of tokens; rows that are not valid cost nothing.

    Tokens are sorted by expert; then each expert in use is unpacked once and run on its own tokens, in the smallest of
    a few static batch sizes that holds them. Dense over all experts would be 8 times the operations; a capacity limit
    would drop tokens.
    """
    c, (n, width) = config, x.shape
    # One past the last expert: sorted behind all others, counted for none.
    chosen = jnp.where(valid[:, None], chosen, c.experts).reshape(-1)
    order = jnp.argsort(chosen)
    counts = jnp.bincount(chosen, length=c.experts)
    starts = jnp.cumsum(counts) - counts
    # From 8, since below that a product costs its weights and not its rows; then a step of at most one and a half.
    sizes = [*(size for i in range(3, 30) for size in (2**i, 3 * 2 ** (i - 1)) if size < n), n]
    tokens = jnp.pad(order // c.experts_per_token, (0, n))
    used = jnp.argsort(counts == 0)

    def run(size, results, start, gate_up, down):
        gate_up, gate_up_bias = gate_up
        down, down_bias = down
        rows = x[jax.lax.dynamic_slice(tokens, (start,), (size,))]
        hidden = swiglu(c, product(rows, gate_up) + gate_up_bias.astype(jnp.float32)).astype(x.dtype)
        out = product(hidden, down) + down_bias.astype(jnp.float32)
        # What the padding rows write here belongs to a later expert, which overwrites it.
        return jax.lax.dynamic_update_slice(results, out, (start, 0))

    def expert(i, results):
        e = used[i]
        weights = lambda p: (expert_weights(p, layer, e, x.dtype), p["bias"][layer, e])
        size = jnp.searchsorted(jnp.array(sizes), counts[e])
        branches = [functools.partial(run, s) for s in sizes]
        return jax.lax.switch(size, branches, results, starts[e], weights(experts["gate_up"]), weights(experts["down"]))

    results = jnp.zeros((n * c.experts_per_token + n, width), jnp.float32)
    results = jax.lax.fori_loop(0, jnp.sum(counts > 0), expert, results)
    results = results[jnp.argsort(order)].reshape(n, c.experts_per_token, width)
    return jnp.einsum("nk,nkw->nw", weights, results)


def swiglu(config: "GptOssConfig", gate_up: jax.Array) -> jax.Array:
    """[n, 2 * hidden] with gate and up interleaved -> [n, hidden]."""
    gate = jnp.minimum(gate_up[:, 0::2], config.swiglu_limit)
    up = jnp.clip(gate_up[:, 1::2], -config.swiglu_limit, config.swiglu_limit)
    return (up + 1) * gate * jax.nn.sigmoid(config.swiglu_alpha * gate)


def expert_weights(params: dict, layer: jax.Array, expert: jax.Array, dtype):
    """One expert's matrix for `product`: dense [in, out], or the two halves of an unpacked one [out, in / 2]."""
    if "kernel" in params:
        # As bits, and behind a barrier that depends on the loop: XLA on a CPU would convert the bfloat16 experts of all
        # layers to float32 ahead of it, 76 GB for the 20B model.
        kernel, expert = jax.lax.optimization_barrier((params["kernel"], expert))
        bits = jax.lax.bitcast_convert_type(kernel, f"uint{8 * kernel.dtype.itemsize}")[layer, expert]
        return jax.lax.bitcast_convert_type(bits, kernel.dtype).astype(dtype)
    return mxfp4.unpack(params["blocks"][layer, expert], params["scales"][layer, expert], dtype)


def product(x: jax.Array, weights) -> jax.Array:
    """x [n, in] times what `expert_weights` gave: float32 [n, out] with float32 sums."""
    if isinstance(weights, tuple):
        return mxfp4.matmul(x, weights)
    return jnp.dot(x, weights, preferred_element_type=jnp.float32)
