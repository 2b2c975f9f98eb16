"""The Lens denoiser: a dual-stream MMDiT whose blocks are one block, stacked and scanned.

Flax NNX modules declare the parameters; `apply` is a pure function of (config, params, inputs). Parameters are one
plain nested dict whose paths are the checkpoint format, e.g. `blocks/image/qkv/kernel` [layers, width, 3, heads, dim].
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as keep

from lens_jax.errors import LensError
from lens_jax.models import lora as low_rank
from lens_jax.models.attention import SAVED, Kernel, attend
from lens_jax.models.layers import (
    RMSNorm,
    layer_norm,
    layout,
    modulate,
    rotary_table,
    rotate,
    timestep_features,
)

Remat = Literal["auto", "none", "mlp", "linear", "full"]
FLOAT_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """Sizes of the denoiser. The defaults are the released Lens: 4,104,225,152 parameters."""

    # Number of identical joint blocks.
    layers: int = 48
    # Attention heads; the residual width is heads * head_dim.
    heads: int = 24
    # Channels of a head, the sum of `rope_axes`.
    head_dim: int = 64
    # Hidden width of the SwiGLU; 0 means int(width / 3 * 8), as in the release.
    mlp_width: int = 0
    # Channels of a packed latent token, in and out.
    latent_channels: int = 128
    # Channels of one text feature layer.
    text_width: int = 2880
    # How many text feature layers are normalised and joined.
    text_layers: int = 4
    # Head channels that rotate with (frame, row, column).
    rope_axes: tuple[int, int, int] = (8, 28, 28)
    # Base of the rotary frequencies.
    rope_theta: float = 10_000.0
    # What activations and matrix products are computed in. Parameters are kept in `param_dtype`.
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    # What parameters are kept in.
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # What the backward pass computes again to save memory, least first: no product; the MLP's hidden layer; all linear
    # layers but the last; whole blocks. Training takes for `auto` the first that fits into its devices.
    remat: Remat = "auto"
    # Lay the blocks out one after another instead of scanning them: faster on a CPU, much longer to compile.
    unroll: bool = False
    # Attention kernel; `auto` is cuDNN on a GPU in half precision, splash on a TPU, blocked on a CPU, XLA elsewhere.
    attention: Kernel = "auto"

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def hidden(self) -> int:
        return self.mlp_width or int(self.width / 3 * 8)

    def __post_init__(self):
        for name in ("layers", "heads", "head_dim", "latent_channels", "text_width", "text_layers"):
            if getattr(self, name) < 1:
                raise LensError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if sum(self.rope_axes) != self.head_dim or any(a % 2 for a in self.rope_axes):
            raise LensError(
                f"model.rope_axes {self.rope_axes} must be even numbers that add up to model.head_dim {self.head_dim}"
            )
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in FLOAT_DTYPES:
                raise LensError(f"model.{name} is {getattr(self, name)!r}; accepted: {', '.join(FLOAT_DTYPES)}")


LENS = DenoiserConfig()
# About 1.2B, the size the report ablates with. It gives the count only, so depth and width here are our choice, with
# the head size and proportions of the release; text as from Qwen3-0.6B (one layer of 1024).
LENS_TOY = DenoiserConfig(layers=32, heads=16, text_width=1024, text_layers=1)


class Stream(nnx.Module):
    """The weights one modality (image or text) has in a joint block."""

    def __init__(self, c: DenoiserConfig, rngs: nnx.Rngs):
        options = {"dtype": c.dtype, "param_dtype": c.param_dtype, "rngs": rngs}
        dense = functools.partial(nnx.Linear, **options)
        dense_general = functools.partial(nnx.LinearGeneral, **options)
        zeros = nnx.initializers.zeros_init()
        # Modulation starts at zero, so every block starts as the identity (adaLN-Zero).
        self.modulation = dense(c.width, 6 * c.width, kernel_init=zeros)
        self.norm1 = RMSNorm(c.width, eps=1e-6, rngs=rngs)
        self.norm2 = RMSNorm(c.width, eps=1e-6, rngs=rngs)
        # q/k/v and gate/up keep an axis of their own: a fused axis cannot be sharded by head without a shuffle.
        self.qkv = dense_general(c.width, (3, c.heads, c.head_dim))
        # 1e-6, not the 1e-5 that the attention class of the release defaults to: the block passes its own value.
        self.norm_q = RMSNorm(c.head_dim, eps=1e-6, rngs=rngs)
        self.norm_k = RMSNorm(c.head_dim, eps=1e-6, rngs=rngs)
        self.out = dense_general((c.heads, c.head_dim), c.width, axis=(-2, -1))
        self.gate_up = dense_general(c.width, (2, c.hidden), use_bias=False)
        self.down = dense(c.hidden, c.width, use_bias=False)

    def project(self, x: jax.Array, shift, scale, table, adapters) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k, v [B, S, heads, head_dim] of x [B, S, W]; q and k are normed by head and rotated."""
        q, k, v = _unstack(keep(adapters(self, "qkv", modulate(self.norm1(x), shift, scale)), "qkv"))
        return rotate(self.norm_q(q), table), rotate(self.norm_k(k), table), v

    def mix_heads(self, attended: jax.Array, sharding, adapters) -> jax.Array:
        """[B, S, heads, head_dim] -> [B, S, W], laid out as `sharding` says."""
        return keep(adapters(self, "out", attended, out_sharding=sharding), "out")

    def feed_forward(self, x: jax.Array, shift, scale, adapters) -> jax.Array:
        gate, up = _unstack(keep(adapters(self, "gate_up", modulate(self.norm2(x), shift, scale)), "gate_up"))
        return keep(adapters(self, "down", jax.nn.silu(gate) * up, out_sharding=layout(x)), "down")


def _unstack(x: jax.Array) -> list[jax.Array]:
    """The parts of axis 2. A split is transposed to one concatenation, where indexing gives a sum of padded parts."""
    return [jnp.squeeze(part, 2) for part in jnp.split(x, x.shape[2], axis=2)]


class Block(nnx.Module):
    """One joint block: both streams attend to both, then each runs its own SwiGLU (release: LensTransformerBlock)."""

    def __init__(self, c: DenoiserConfig, rngs: nnx.Rngs):
        self.kernel = c.attention
        self.image = Stream(c, rngs)
        self.text = Stream(c, rngs)

    def __call__(self, image, text, conditioning, tables, lengths, n_image, adapters: low_rank.Adapters):
        """image [B, N, W], text [B, T, W], conditioning [B, W] = silu(time embedding), lengths [B] -> image, text."""
        streams = ((self.image, image), (self.text, text))
        loras = adapters.of("image"), adapters.of("text")
        # Chunk order of the release: (attention, MLP) x (shift, scale, gate).
        mods = [keep(lora(s, "modulation", conditioning), "modulation") for (s, _), lora in zip(streams, loras)]
        mods = [jnp.split(mod[:, None], 6, axis=-1) for mod in mods]
        with jax.named_scope("attention"):
            inputs = zip(streams, mods, tables, loras)
            parts = [stream.project(x, *mod[:2], table, lora) for (stream, x), mod, table, lora in inputs]
            attended = attend(*parts, lengths, n_image, self.kernel)
        with jax.named_scope("mlp"):
            outputs = []
            for (stream, x), mod, y, lora in zip(streams, mods, attended, loras):
                x = x + mod[2] * stream.mix_heads(y, layout(x), lora)
                outputs.append(x + mod[5] * stream.feed_forward(x, mod[3], mod[4], lora))
        return tuple(outputs)


class Stem(nnx.Module):
    """All that is not a block: the ways in, the time embedding and the way out."""

    def __init__(self, c: DenoiserConfig, rngs: nnx.Rngs):
        dense = functools.partial(nnx.Linear, dtype=c.dtype, param_dtype=c.param_dtype, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.image_in = dense(c.latent_channels, c.width)
        # Text layers differ 50-fold in magnitude (report: GPT-OSS 234 to 10,700), hence one norm a layer.
        self.text_norm = RMSNorm((c.text_layers, c.text_width), eps=1e-5, rngs=rngs)
        self.text_in = dense(c.text_layers * c.text_width, c.width)
        self.time_in = dense(256, c.width)
        self.time_out = dense(c.width, c.width)
        self.modulation_out = dense(c.width, 2 * c.width, kernel_init=zeros)
        self.image_out = dense(c.width, c.latent_channels, kernel_init=zeros)

    def read_text(self, layers: tuple[jax.Array, ...], adapters) -> jax.Array:
        joined = rearrange(self.text_norm(jnp.stack(layers, axis=-2)), "b t layer w -> b t (layer w)")
        return adapters(self, "text_in", joined)

    def read_time(self, t: jax.Array, dtype, adapters) -> jax.Array:
        hidden = adapters(self, "time_in", timestep_features(t).astype(dtype))
        return adapters(self, "time_out", jax.nn.silu(hidden))

    def write(self, image: jax.Array, conditioning: jax.Array, adapters) -> jax.Array:
        # Here the order is scale, shift: the opposite of the blocks.
        scale, shift = jnp.split(adapters(self, "modulation_out", conditioning)[:, None], 2, axis=-1)
        return adapters(self, "image_out", modulate(layer_norm(image, 1e-6), shift, scale))


@functools.cache
def _graphs(config: DenoiserConfig):
    """The static halves of the two modules; building them costs a trace, so once a config."""
    build = lambda cls: nnx.graphdef(nnx.eval_shape(lambda: cls(config, nnx.Rngs(0))))
    return build(Stem), build(Block)


def _pure(module: nnx.Module, dtype: str) -> dict:
    return jax.tree.map(lambda x: x.astype(dtype), nnx.to_pure_dict(nnx.state(module)))


def init(config: DenoiserConfig, key: jax.Array) -> dict:
    """Fresh parameters as a nested dict in `config.param_dtype`; every leaf under `blocks` has a leading layer axis."""
    stem_key, block_key = jax.random.split(key)
    params = _pure(Stem(config, nnx.Rngs(stem_key)), config.param_dtype)
    one_block = lambda k: _pure(Block(config, nnx.Rngs(k)), config.param_dtype)
    return {**params, "blocks": jax.vmap(one_block)(jax.random.split(block_key, config.layers))}


def abstract_params(config: DenoiserConfig) -> dict:
    """Shapes and dtypes of `init` without allocating anything."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def parameter_count(config: DenoiserConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


# What the forward pass keeps of a block for the backward one, besides its input: results of products by name, what an
# attention kernel keeps, nothing that is computed number by number. With the input, a token has 12.3, 7, 3 and 1 times
# the width. The inside of an adapter ("lora") is as long as its rank.
KEPT: dict[Remat, tuple[str, ...]] = {
    "none": ("modulation", "qkv", *SAVED, "out", "gate_up", "down", "lora"),
    "mlp": ("modulation", "qkv", *SAVED, "out", "down", "lora"),
    "linear": ("modulation", *SAVED, "down", "lora"),
    "full": (),
}


def kept(remat: Remat) -> tuple[str, ...]:
    """What is kept under a remat; `auto` is `none` until somebody has chosen."""
    return KEPT.get(remat, KEPT["none"])


def _policy(remat: Remat) -> Callable[..., bool]:
    """What `jax.checkpoint` asks of every operation: whether its results are kept."""
    names = kept(remat)
    return lambda primitive, *_, **params: (params["name"] if primitive.name == "name" else primitive.name) in names


def apply(
    config: DenoiserConfig,
    params: dict,
    latents: jax.Array,
    text: tuple[jax.Array, ...],
    text_lengths: jax.Array,
    t: jax.Array,
    positions: jax.Array,
    n_image: jax.Array | None = None,
    gather: Callable[[dict], dict] = lambda params: params,
    lora: dict | None = None,
    lora_dropout: low_rank.Dropout | None = None,
) -> jax.Array:
    """The velocity (noise - clean) at noise level t.

    Args:
      params: the tree of `init`.
      latents: normalised packed latents [B, N, latent_channels].
      text: `text_layers` arrays [B, T, text_width], right padded; T may be 0.
      text_lengths: int32 [B] valid text tokens a row; 0 is the unconditional case: image attends only to image.
      t: noise level [B] in [0, 1], 1 is pure noise.
      positions: int32 [N + T, 3] from `layers.joint_positions`.
      n_image: int32 scalar, tokens of `latents` that are no padding, for programs that serve several shapes; None is N.
      gather: done to the weights of a block just before they are used, and to those outside the blocks: where they are
        sharded, they are gathered here.
      lora: an adapter, y = W x + B A x (see `models.lora`; `scaled` has put alpha / rank into its B). One of zeros
        changes no bit.
      lora_dropout: of the inputs of the adapter, in training.

    Returns velocity [B, N, latent_channels] in the dtype of `latents`.
    """
    inputs = latents, text, text_lengths, t, positions, n_image
    carry, blocks, block, write = _begin(config, params, *inputs, gather=gather, lora=lora, lora_dropout=lora_dropout)

    def body(carry, inputs):
        return block(carry, *inputs), None

    with jax.named_scope("blocks"):
        unroll = config.layers if config.unroll else 1
        (image, _), _ = jax.lax.scan(_checkpointed(config, body), carry, blocks, unroll=unroll)
    return write(image)


def apply_with_features(
    config: DenoiserConfig, params: dict, *inputs, after: tuple[int, ...], velocity: bool, gather=lambda params: params
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """(image tokens [B, N, width] after each of some blocks, the velocity where it is wanted) of one forward pass.

    `inputs` are those of `apply`, from latents to n_image; `after` counts blocks from 1, rising. Features have
    gradients; the velocity has none, so what comes behind the last feature is not gone through backwards. Without it,
    it is not computed either.
    """
    carry, blocks, block, write = _begin(config, params, *inputs, gather=gather)

    def body(carry, number):
        # By its number, inside what is computed again: a part of a stacked array would be a copy of it.
        return block(carry, *jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, 0, False), blocks)), None

    def run(carry, start: int, stop: int):
        with jax.named_scope("blocks"):
            unroll = max(1, stop - start) if config.unroll else 1
            return jax.lax.scan(_checkpointed(config, body), carry, jnp.arange(start, stop), unroll=unroll)[0]

    features, start = [], 0
    for stop in after:
        carry, start = run(carry, start, stop), stop
        features.append(carry[0])
    if not velocity:
        return tuple(features), None
    image, _ = run(jax.lax.stop_gradient(carry), start, config.layers)
    return tuple(features), jax.lax.stop_gradient(write(image))


def _checkpointed(config: DenoiserConfig, body: Callable) -> Callable:
    # Inside a scan XLA cannot undo the recomputation, so the barriers of prevent_cse would only cost.
    again = config.remat not in ("auto", "none")
    return jax.checkpoint(body, policy=_policy(config.remat), prevent_cse=config.unroll and again)


def _begin(
    config, params, latents, text, text_lengths, t, positions, n_image=None, *, gather, lora=None, lora_dropout=None
):
    """What comes before the blocks, the blocks, and what comes after them.

    Returns the two streams as (image, text); what a block has of its own, stacked: parameters, adapter, key of dropout;
    (streams, those of one block) -> streams; image -> velocity.
    """
    stem_graph, block_graph = _graphs(config)
    stem = nnx.merge(stem_graph, gather({name: value for name, value in params.items() if name != "blocks"}))
    outside, block_lora, block_keys = low_rank.split(lora, lora_dropout, config.layers)
    outside = outside._replace(tree=gather(outside.tree))
    dtype = jnp.dtype(config.dtype)

    with jax.named_scope("in"):
        image = outside(stem, "image_in", latents.astype(dtype))
        hidden_text = stem.read_text(tuple(layer.astype(dtype) for layer in text), outside)
        conditioning = jax.nn.silu(stem.read_time(t, dtype, outside))
        table = rotary_table(positions, config.rope_axes, config.rope_theta)
        tables = [tuple(jnp.split(part, [latents.shape[1]])[i] for part in table) for i in range(2)]
        lengths = (latents.shape[1] if n_image is None else n_image) + text_lengths
        if n_image is None and hidden_text.shape[1] == 0:
            lengths = None

    def block(streams, block_params, tree, key):
        network = nnx.merge(block_graph, gather(block_params))
        drop = None if key is None else lora_dropout._replace(key=key)
        return network(*streams, conditioning, tables, lengths, n_image, low_rank.Adapters(gather(tree), drop))

    def write(image):
        with jax.named_scope("out"):
            return stem.write(image, conditioning, outside).astype(latents.dtype)

    return (image, hidden_text), (params["blocks"], block_lora, block_keys), block, write
