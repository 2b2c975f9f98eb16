"""GPT-OSS, the language model whose hidden states the denoiser reads (release: `text_encoder/`).

A decoder of 24 layers: attention with a learned sink per head, over 128 positions in even layers and over all in odd
ones, then a mixture of 32 SwiGLU experts of which every token uses four. Parameters are a plain nested dict, layers
stacked on the leading axis. The experts, 91 % of the weights, stay packed (see `mxfp4`): one expert of one layer is
unpacked at a time. On a CPU the 20B model so gives features within 15.5 GB: 12.6 of weights without the head, 2.6 for
the attention weights that XLA converts to float32 ahead of the loop over layers. Experts that were quantised in another
way are dense (`packed=False`).

Where the release computes in bfloat16 we round less, for the same cost: router, softmax and the sum of the experts
are float32 here. Norms are float32 in both.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lens_jax.errors import LensError
from lens_jax.models import mxfp4
from lens_jax.models.experts import mixture

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class GptOssConfig:
    """Sizes of the language model. The defaults are GPT-OSS-20B: 20,914,757,184 parameters."""

    # Decoder layers; even ones attend to `window` positions, odd ones to all before.
    layers: int = 24
    # Width of the residual stream.
    width: int = 2880
    # Hidden width of an expert.
    hidden: int = 2880
    # Query heads.
    heads: int = 64
    # Key and value heads, each shared by heads / kv_heads query heads.
    kv_heads: int = 8
    # Channels of a head.
    head_dim: int = 64
    # Experts of a layer.
    experts: int = 32
    # Experts a token uses.
    experts_per_token: int = 4
    # Rows of the embedding.
    vocab: int = 201_088
    # Positions an even layer sees, the token itself included.
    window: int = 128
    # Epsilon of every RMSNorm.
    norm_eps: float = 1e-5
    # Base of the rotary frequencies.
    rope_theta: float = 150_000.0
    # YaRN: how many times the context was stretched, from how many positions.
    rope_factor: float = 32.0
    rope_original_context: int = 4096
    # YaRN: rotations within the original context above which a frequency is kept, and below which it is stretched.
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    # YaRN: round the two bounds to whole frequencies. False in the release; True would change one of them by 76 %.
    rope_truncate: bool = False
    # Slope of the experts' sigmoid and the bound of its inputs.
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    # What activations and matrix products are computed in.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # What the parameters outside the packed experts are kept in.
    param_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Experts in packed MXFP4, as released; else dense in `param_dtype`: 38 GB and not 10 for the 20B model.
    packed: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("dtype"):
                if value not in DTYPES:
                    raise LensError(f"text.{field.name} is {value!r}; accepted: {', '.join(DTYPES)}")
            elif field.name not in ("rope_truncate", "packed") and not 0 < value < math.inf:
                raise LensError(f"text.{field.name} is {value}; it must be positive")
        for name in ("width", "hidden"):
            if self.packed and getattr(self, name) % mxfp4.GROUP:
                raise LensError(f"text.{name} is {getattr(self, name)}; packed experts need a multiple of 32")
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise LensError(
                f"text.heads {self.heads} must be a multiple of text.kv_heads {self.kv_heads}, and text.head_dim "
                f"{self.head_dim} even"
            )
        if self.experts_per_token > self.experts:
            raise LensError(f"text.experts_per_token {self.experts_per_token} exceeds text.experts {self.experts}")


GPT_OSS_20B = GptOssConfig()


def abstract_params(config: GptOssConfig, head: bool = True) -> dict:
    """Shapes and dtypes of the parameters; `head` adds the final norm and the vocabulary, which features do not need.

    The vocabulary is [vocab, width] like the embedding, as in the release: to transpose 1.2 GB would buy nothing.
    """
    c, dtype = config, jnp.dtype(config.param_dtype)
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    byte = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.uint8)

    def experts(outputs, inputs):
        if not c.packed:
            kernel = leaf(c.layers, c.experts, inputs, outputs)
            return {"kernel": kernel, "bias": leaf(c.layers, c.experts, outputs)}
        shape = (c.layers, c.experts, outputs, inputs // mxfp4.GROUP)
        return {"blocks": byte(*shape, mxfp4.GROUP_BYTES), "scales": byte(*shape), "bias": leaf(*shape[:3])}

    def heads(count):
        return {"kernel": leaf(c.layers, c.width, count, c.head_dim), "bias": leaf(c.layers, count, c.head_dim)}

    layers = {
        "attention_norm": {"scale": leaf(c.layers, c.width)},
        "q": heads(c.heads),
        "k": heads(c.kv_heads),
        "v": heads(c.kv_heads),
        "sinks": leaf(c.layers, c.heads),
        "out": {"kernel": leaf(c.layers, c.heads, c.head_dim, c.width), "bias": leaf(c.layers, c.width)},
        "mlp_norm": {"scale": leaf(c.layers, c.width)},
        "router": {"kernel": leaf(c.layers, c.width, c.experts), "bias": leaf(c.layers, c.experts)},
        "experts": {"gate_up": experts(2 * c.hidden, c.width), "down": experts(c.width, c.hidden)},
    }
    params = {"embed": leaf(c.vocab, c.width), "layers": layers}
    return {**params, "norm": {"scale": leaf(c.width)}, "unembed": leaf(c.vocab, c.width)} if head else params


def parameter_count(config: GptOssConfig) -> int:
    """Weights as if nothing were packed: two in a byte of a block, none in a scale."""
    count = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        count += leaf.size * {"blocks": 2, "scales": 0}.get(path[-1].key, 1)
    return count


def init(config: GptOssConfig, key: jax.Array, head: bool = True) -> dict:
    """Random parameters of a sensible magnitude, for tests and benchmarks. Nothing here trains this model."""

    def draw(path, leaf, key):
        name = path[-1].key
        if name == "blocks":
            return _in_parts(lambda key, shape: jax.random.bits(key, shape, jnp.uint8), key, leaf.shape)
        if name == "scales":
            # A random nibble has a mean square of 8.6, so 2^(120 - 127) makes weights of about 0.023.
            return jnp.full(leaf.shape, 120, jnp.uint8)
        noise = 0.02 * _in_parts(lambda key, shape: jax.random.normal(key, shape, leaf.dtype), key, leaf.shape)
        return 1 + noise if name == "scale" else noise

    paths, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config, head))
    keys = jax.random.split(key, len(paths))
    return tree.unflatten([draw(path, leaf, k) for (path, leaf), k in zip(paths, keys)])


def _in_parts(draw: Callable, key: jax.Array, shape: tuple[int, ...], largest: int = 2**24) -> jax.Array:
    """`draw(key, shape)`, from `largest` numbers on by the leading axes: drawing takes 13 times the memory of bytes."""
    axes = 0
    while math.prod(shape[axes:]) > largest:
        axes += 1
    if not axes:
        return draw(key, shape)
    keys, part = jax.random.split(key, math.prod(shape[:axes])), shape[axes:]
    drawn = jax.lax.map(lambda key: draw(key, part), keys, batch_size=max(1, largest // 4 // math.prod(part)))
    return drawn.reshape(shape)


def rotary_frequencies(config: GptOssConfig) -> tuple[np.ndarray, float]:
    """YaRN's frequencies, float32 [head_dim / 2], and the factor on cosines and sines of queries and keys."""
    c, half = config, config.head_dim // 2
    plain = c.rope_theta ** (-np.arange(half) / half)
    # The (fractional) index of the frequency that turns `rotations` times within the original context.
    index = lambda rotations: (
        half * math.log(c.rope_original_context / (rotations * 2 * math.pi)) / math.log(c.rope_theta)
    )
    low, high = index(c.rope_beta_fast), index(c.rope_beta_slow)
    if c.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.head_dim - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
    factor = 0.1 * math.log(c.rope_factor) + 1 if c.rope_factor > 1 else 1.0
    return (plain * (1 - ramp) + plain / c.rope_factor * ramp).astype(np.float32), factor


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale in float32 with the product, then back to x.dtype (the denoiser's norms round before it)."""
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
    return (x32 * inverse_rms * scale.astype(jnp.float32)).astype(x.dtype)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate channels i and i + head_dim / 2 of x [B, T, heads, head_dim] by tables [B, T, head_dim / 2], float32."""
    cos, sin = (part[:, :, None, :] for part in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, sinks: jax.Array) -> jax.Array:
    """Grouped attention whose softmax has one more logit per head that takes weight and gives nothing.

    q: [B, T, heads, head_dim]; k, v: [B, S, kv_heads, head_dim], query head j reads key head j // (heads / kv_heads);
    visible: bool [B, T, S]; sinks: [heads], not scaled. Returns [B, T, heads, head_dim]; softmax in float32.
    """
    b, t, heads, dim = q.shape
    q = q.reshape(b, t, k.shape[2], -1, dim)
    logits = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * dim**-0.5
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    sinks = sinks.astype(jnp.float32).reshape(1, k.shape[2], -1, 1, 1)
    top = jnp.maximum(logits.max(-1, keepdims=True), sinks)
    weights = jnp.exp(logits - top)
    weights = weights / (weights.sum(-1, keepdims=True) + jnp.exp(sinks - top))
    return jnp.einsum("bkgts,bskd->btkgd", weights.astype(q.dtype), v).reshape(b, t, heads, dim)


class Access(NamedTuple):
    """How a program comes by weights, which may be spread over devices."""

    # (params, ids) -> rows of the embedding [..., width].
    embed: Callable[[dict, jax.Array], jax.Array]
    # (stacked layers, layer) -> a stack that holds the layer whole, and where in it.
    layer: Callable[[dict, jax.Array], tuple[dict, jax.Array]]


# All of them here. A layer is not cut out of the stack: of 423 MB of packed experts only those in use are then read.
WHOLE = Access(lambda params, ids: params["embed"][ids], lambda stack, i: (stack, i))


def run(config: GptOssConfig, params: dict, x, positions, valid, taps, extend, state, access: Access = WHOLE):
    """The layers up to the last of `taps`, which rise: (their outputs [len(taps), B, T, width], state).

    x: [B, T, width]; positions: int32 [B, T]; valid: bool [B, T]. `extend(layer, k, v, state)` returns the keys and
    values to attend to [B, S, kv_heads, head_dim], which lie at positions 0..S-1, and the new state.
    """
    c, dtype = config, jnp.dtype(config.dtype)
    frequencies, factor = rotary_frequencies(c)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    table = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    # Each layer writes to the slot of the next tap: the last to write is the tap itself.
    slots = jnp.array(np.searchsorted(taps, np.arange(taps[-1] + 1)))

    def dense(spec, h, p, i):
        product = jnp.einsum(spec, h, p["kernel"][i].astype(dtype), preferred_element_type=jnp.float32)
        return (product + p["bias"][i].astype(jnp.float32)).astype(dtype)

    def layer(carry, i):
        x, tapped, state = carry
        stack, at = access.layer(params["layers"], i)
        with jax.named_scope("attention"):
            h = rms_norm(x, stack["attention_norm"]["scale"][at], c.norm_eps)
            q, k, v = (dense("btw,whd->bthd", h, stack[name], at) for name in "qkv")
            keys, values, state = extend(i, rotate(k, table), v, state)
            distance = positions[:, :, None] - jnp.arange(keys.shape[1])
            window = jnp.where(i % 2 == 0, c.window, 2**30)
            mixed = attend(rotate(q, table), keys, values, (distance >= 0) & (distance < window), stack["sinks"][at])
            x = x + dense("bthd,hdw->btw", mixed, stack["out"], at)
        with jax.named_scope("experts"):
            h = rms_norm(x, stack["mlp_norm"]["scale"][at], c.norm_eps)
            x = x + mixture(c, stack, at, h.reshape(-1, c.width), valid.reshape(-1)).reshape(x.shape).astype(dtype)
        return (x, jax.lax.dynamic_update_index_in_dim(tapped, x, slots[i], 0), state), None

    tapped = jnp.zeros((len(taps), *x.shape), dtype)
    (_, tapped, state), _ = jax.lax.scan(layer, (x, tapped, state), jnp.arange(taps[-1] + 1))
    return tapped, state


def embed(config: GptOssConfig, params: dict, ids, access: Access = WHOLE) -> jax.Array:
    """Rows of the embedding, [..., width] in `config.dtype`."""
    return access.embed(params, ids).astype(config.dtype)


def unembed(config: GptOssConfig, params: dict, x) -> jax.Array:
    """Residual stream -> float32 logits, through the final norm."""
    _check_head(params)
    h = rms_norm(x, params["norm"]["scale"], config.norm_eps)
    return jnp.einsum("...w,vw->...v", h, params["unembed"].astype(config.dtype), preferred_element_type=jnp.float32)


def _check_head(params: dict) -> None:
    if "unembed" not in params:
        raise LensError("these text encoder weights have no vocabulary head (lm_head), so they give features only")


def check_taps(config: GptOssConfig, taps: tuple[int, ...]) -> None:
    whole = all(type(tap) is int and 0 <= tap < config.layers for tap in taps)
    if not taps or not whole or len(set(taps)) < len(taps):
        raise LensError(f"text layers {taps} must be different and lie in 0..{config.layers - 1}")


def empty_cache(config: GptOssConfig, batch: int, positions: int, layers: int = 0) -> tuple[jax.Array, jax.Array]:
    """Keys and values [layers, batch, positions, kv_heads, head_dim] to be filled; 0 layers means all."""
    shape = (layers or config.layers, batch, positions, config.kv_heads, config.head_dim)
    return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)


def write_cache(positions):
    """An `extend` that keeps all keys and values in a cache, this call's at `positions` [B, T]."""
    rows = jnp.arange(positions.shape[0])[:, None]

    def extend(i, k, v, cache):
        cache = tuple(whole.at[i, rows, positions].set(part) for whole, part in zip(cache, (k, v)))
        return cache[0][i], cache[1][i], cache

    return extend


def hidden_states(
    config: GptOssConfig, params: dict, ids, lengths, taps: tuple[int, ...], past=None, access: Access = WHOLE
) -> jax.Array:
    """The residual stream after each layer of `taps`, before any final norm; layers after the last are not run.

    Args:
      ids: int32 [B, T], right padded.
      lengths: int32 [B] valid tokens a row. Padding has no influence and no experts; its outputs are meaningless.
      taps: layers counted from 0, in any order, which is that of the result.
      past: keys and values of a shared beginning from `prefill`, as if its P tokens stood before every row. The cost
        is that of T tokens and not of P + T.
      access: how to come by weights that are spread over devices.

    Returns [len(taps), B, T, width] in `config.dtype`.
    """
    check_taps(config, taps)
    start = past[0].shape[2] if past else 0
    index = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)

    def extend(i, k, v, state):
        if past is None:
            return k, v, state
        join = lambda old, new: jnp.concatenate([jnp.broadcast_to(old[i], (len(new), *old.shape[2:])), new], axis=1)
        return join(past[0], k), join(past[1], v), state

    valid = index < lengths[:, None]
    x = embed(config, params, ids, access)
    rising = tuple(sorted(taps))
    found = run(config, params, x, start + index, valid, rising, extend, (), access)[0]
    return found if rising == tuple(taps) else found[np.array([rising.index(tap) for tap in taps])]


def prefill(
    config: GptOssConfig, params: dict, ids, layers: int = 0, access: Access = WHOLE
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [layers, 1, P, kv_heads, head_dim] of one sequence ids [P], for `hidden_states`."""
    cache = empty_cache(config, 1, len(ids), layers)
    positions = jnp.arange(len(ids))[None]
    x = embed(config, params, ids[None], access)
    taps = (len(cache[0]) - 1,)
    return run(config, params, x, positions, positions >= 0, taps, write_cache(positions), cache, access)[1]


def logits(config: GptOssConfig, params: dict, ids, lengths) -> jax.Array:
    """Scores of the next token after each position, float32 [B, T, vocab]. LensError where the head was not loaded."""
    _check_head(params)
    return unembed(config, params, hidden_states(config, params, ids, lengths, (config.layers - 1,))[0])
