"""The networks of a release that training reads through and does not change: FLUX.2's autoencoder and GPT-OSS.

They are loaded from their folder, never saved with a run. On a mesh the autoencoder is whole on every device; GPT-OSS
is cut as `parallel.GPT_OSS_RULES` say and brought together a layer at a time, packed: 423 MB of the 20B model.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lens_jax import parallel
from lens_jax.encoders import harmony
from lens_jax.encoders.images import from_uint8
from lens_jax.encoders.text import TextFeatures, check_prompts
from lens_jax.encoders.tokenizer import encode_prompt, pad
from lens_jax.errors import LensError
from lens_jax.models import autoencoder, gpt_oss
from lens_jax.models.autoencoder import AutoencoderConfig
from lens_jax.models.gpt_oss import GPT_OSS_20B, GptOssConfig
from lens_jax.models.latent_grid import latent_grid


@dataclasses.dataclass(frozen=True)
class FluxCodecConfig:
    """The FLUX.2 autoencoder of a release as the codec (report 2: frozen, latents of 16 x 16 pixels)."""

    # A release folder, its conversion, or a file of weights.
    path: str = "checkpoints/Lens-Base"
    # Draw latents from the autoencoder's posterior instead of taking its mean. The report does not say which.
    sample: bool = False
    # Sizes, which must be those of the weights, and what it computes in.
    model: AutoencoderConfig = AutoencoderConfig()

    @property
    def latent_channels(self) -> int:
        return self.model.latent_channels

    @property
    def tile(self) -> int:
        """Image sides must be a multiple of this many pixels."""
        return self.model.tile


@dataclasses.dataclass(frozen=True)
class GptOssTextConfig:
    """GPT-OSS of a release as the text encoder (report 2): four layers of the conversation around a caption."""

    # A release folder, its conversion, or a file of weights; with the tokenizer.
    path: str = "checkpoints/Lens-Base"
    # Layers whose output is a feature, counted from 0.
    selected: tuple[int, ...] = (5, 11, 17, 23)
    # The day the conversation claims to be, YYYY-MM-DD; the features depend on it slightly.
    date: str = harmony.DEFAULT_DATE
    # Tokens of a conversation, 97 before the caption and 22 after it included; longer captions are cut at their end.
    # The report's captions have 109 words on average, about 270 tokens in all. The release reads 512.
    max_conversation: int = harmony.MAX_TOKENS
    # Sizes, which must be those of the weights, and what it computes in.
    model: GptOssConfig = GPT_OSS_20B

    @property
    def width(self) -> int:
        """Channels of a feature layer."""
        return self.model.width

    @property
    def num_layers(self) -> int:
        """Feature layers a caption has."""
        return len(self.selected)

    @property
    def max_tokens(self) -> int:
        """Tokens of a caption's features: what is behind the shared beginning."""
        return self.max_conversation - harmony.PREFIX_TOKENS

    def __post_init__(self):
        harmony.check_date(self.date)
        gpt_oss.check_taps(self.model, self.selected)
        if self.max_tokens < harmony.SUFFIX_TOKENS:
            least = harmony.PREFIX_TOKENS + harmony.SUFFIX_TOKENS
            raise LensError(f"text.max_conversation is {self.max_conversation}; it must be at least {least}")


class FrozenAutoencoder:
    """Its weights, for `encode_images`."""

    def __init__(self, config: FluxCodecConfig, mesh: Mesh | None = None):
        _, part = _find(config, "codec", "autoencoder")
        self.digest = part.digest()
        self.params = _place(part, config.model, parallel.AUTOENCODER_RULES, mesh)


def encode_images(config: FluxCodecConfig, mesh, params: dict, pixels: jax.Array, key: jax.Array) -> jax.Array:
    """uint8 [B, H, W, 3] -> latents [B, N, C] in float32, for use inside a program."""
    c = config.model
    rows, columns = latent_grid(c, *pixels.shape[1:3])
    noise = None
    if config.sample:
        shape = (len(pixels), rows * columns, c.latent_channels)
        spread = None if mesh is None else PartitionSpec(jax.typeof(pixels).sharding.spec[0])
        noise = jax.random.normal(key, shape, out_sharding=spread)
    inner = lambda params, pixels, noise: autoencoder.encode(c, params, from_uint8(pixels), noise)
    if mesh is None:
        return inner(params, pixels, noise)
    spread = PartitionSpec(jax.typeof(pixels).sharding.spec[0])
    specs = (PartitionSpec(), spread, None if noise is None else spread)
    return jax.shard_map(inner, in_specs=specs, out_specs=spread, check_vma=False)(params, pixels, noise)


class FrozenTextEncoder:
    """Captions to layers of GPT-OSS: token ids in the reading threads, features on the devices.

    Every conversation begins with the same 97 tokens, whose keys and values are computed once.
    """

    def __init__(self, config: GptOssTextConfig, mesh: Mesh | None = None):
        from lens_jax.convert import load

        source, part = _find(config, "text", "text_encoder")
        tokenizer = load.tokenizer_of(source)
        if tokenizer is None:
            raise LensError(f"text.path {config.path}: no tokenizer; a release has it in tokenizer/")
        self.digest = part.digest()
        params = _place(part, config.model, parallel.GPT_OSS_RULES, mesh, head=False)
        self.config, self._mesh, self.params = config, mesh, params
        self._tokenizer, self._frame = tokenizer, harmony.image_frame(config.date)
        prefix = parallel.everywhere(np.array(tokenizer.encode_pieces(self._frame.prefix), np.int32), mesh)
        # Keys and values [layers, 1, 97, kv_heads, head_dim].
        self.past = parallel.on(mesh, _prefill)(config, mesh, params, prefix)

    def tokens(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(int32 [B, max_tokens], lengths [B]) behind the shared beginning; a blank caption has length 0."""
        c = self.config
        start = harmony.PREFIX_TOKENS
        encode = lambda text: encode_prompt(self._tokenizer, self._frame, text, c.max_conversation)[start:]
        rows = [encode(caption) if text else [] for caption, text in zip(captions, check_prompts(captions))]
        return pad(rows, c.max_tokens, self._tokenizer.pad_token)

    def features(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of a few prompts on the host, for samples while training. On a mesh all processes must call it."""
        ids, lengths = self.tokens(prompts)
        arrays = [parallel.everywhere(x, self._mesh) for x in (ids, lengths)]
        encode = jax.jit(encode_text, static_argnums=(0, 1))
        layers = parallel.on(self._mesh, encode)(self.config, self._mesh, self.params, self.past, *arrays)
        layers = parallel.local_copy(layers, self._mesh)
        return TextFeatures(tuple(np.asarray(layer) for layer in layers), lengths, self.config.date)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(config: GptOssTextConfig, mesh, params: dict, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of the beginning that all conversations share."""
    access = gpt_oss.WHOLE if mesh is None else _access(mesh, params)
    prefill = lambda params, ids: gpt_oss.prefill(config.model, params, ids, config.selected[-1] + 1, access)
    if mesh is None:
        return prefill(params, ids)
    specs, everywhere = parallel.tree_specs(parallel.GPT_OSS_RULES, params, mesh), PartitionSpec()
    return jax.shard_map(prefill, in_specs=(specs, everywhere), out_specs=everywhere, check_vma=False)(params, ids)


def encode_text(
    config: GptOssTextConfig, mesh, params: dict, past: tuple, ids: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, ...]:
    """Feature layers [B, T, width] of token ids [B, T], for use inside a program; rows stay where they are."""
    access = gpt_oss.WHOLE if mesh is None else _access(mesh, params)

    def inner(params, past, ids, lengths):
        layers = gpt_oss.hidden_states(config.model, params, ids, lengths, config.selected, past, access)
        # Padding comes out as numbers without meaning; the same zeros as in a cache cost nothing.
        valid = jnp.arange(ids.shape[1]) < lengths[:, None]
        return tuple(jnp.where(valid[..., None], layers, 0))

    if mesh is None:
        return inner(params, past, ids, lengths)
    # Rows over all axes where they go round: else devices along `tensor` would all compute the same.
    home = PartitionSpec(jax.typeof(ids).sharding.spec[0])
    rows = PartitionSpec(parallel.AXES) if ids.shape[0] % mesh.size == 0 else home
    specs = (parallel.tree_specs(parallel.GPT_OSS_RULES, params, mesh), PartitionSpec(), rows, rows)
    spread = jax.shard_map(inner, in_specs=specs, out_specs=(rows,) * config.num_layers, check_vma=False)
    layers = spread(params, past, jax.reshard(ids, rows), jax.reshard(lengths, rows))
    return tuple(jax.reshard(layer, home) for layer in layers)


def _access(mesh: Mesh, params: dict) -> gpt_oss.Access:
    """Weights cut over `fsdp`, seen from inside `shard_map`."""
    specs = parallel.tree_specs(parallel.GPT_OSS_RULES, params, mesh)

    def whole(spec: PartitionSpec, part: jax.Array) -> jax.Array:
        cut = [axis for axis, name in enumerate(spec[1:]) if name == "fsdp"]
        return jax.lax.all_gather(part, "fsdp", axis=cut[0], tiled=True) if cut else part

    def layer(stack: dict, i: jax.Array) -> tuple[dict, jax.Array]:
        parts = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, 0, keepdims=False), stack)
        is_spec = lambda x: isinstance(x, PartitionSpec)
        gathered = jax.tree.map(whole, specs["layers"], parts, is_leaf=is_spec)
        return jax.tree.map(lambda x: x[None], gathered), jnp.int32(0)

    def embed(params: dict, ids: jax.Array) -> jax.Array:
        table = params["embed"]
        if "fsdp" not in specs["embed"]:
            return table[ids]
        # Every device looks up its channels of everybody's tokens, then channels are exchanged for rows: a thousandth
        # of what it would take to bring the table together.
        everybodys = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)
        return jax.lax.all_to_all(table[everybodys], "fsdp", split_axis=0, concat_axis=ids.ndim, tiled=True)

    return gpt_oss.Access(embed, layer)


def _place(part, config, rules: dict, mesh: Mesh | None, **options) -> dict:
    """The parameters of a network laid out as its rules say; `options` are those of its template."""
    from lens_jax.convert.place import place

    template = part.component.module.template(config, **options)
    places = None
    if mesh is not None:
        spec = lambda path, like: parallel.spec_of(rules, path, like.shape, mesh)
        places = {path: NamedSharding(mesh, spec(path, like)) for path, like in template.items()}
    return place(part.leaves(config, **options), template, places)


def _find(config, field: str, component: str):
    """(source, part) of a network; LensError where it is not there or has other sizes than the config says."""
    from lens_jax.convert import load

    try:
        found, part = load.find_part(config.path, component)
    except LensError as error:
        raise LensError(f"{field}.path: {error}") from None
    stored = part.config(dtype=config.model.dtype, param_dtype=config.model.param_dtype)
    for item in dataclasses.fields(config.model):
        ours, theirs = getattr(config.model, item.name), getattr(stored, item.name)
        if ours != theirs:
            raise LensError(f"{field}.model.{item.name} is {ours!r}, but the weights in {part.path} have {theirs!r}")
    return found, part
