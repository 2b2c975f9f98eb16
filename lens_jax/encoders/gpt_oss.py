"""The text encoder of the release (LensGptOssEncoder): a prompt, its Harmony conversation, four layers of GPT-OSS.

One implementation samples and trains. Every conversation begins with the same 97 tokens, whose features are dropped:
their keys and values are computed once, so a prompt costs its own tokens and the 22 behind it. On a mesh the weights
are sharded as `parallel.GPT_OSS_RULES` say and gathered a layer at a time, packed: 423 MB of the 20B model.
"""

import collections
import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lens_jax import flops, parallel
from lens_jax.encoders import harmony
from lens_jax.encoders.cache import CACHE_BYTES, Cache
from lens_jax.encoders.text import TextFeatures, TextInputs, check_prompts
from lens_jax.encoders.tokenizer import HarmonyTokenizer, encode_prompt, find_tokenizer, pad
from lens_jax.errors import LensError
from lens_jax.models import gpt_oss
from lens_jax.models.gpt_oss import GPT_OSS_20B, GptOssConfig

# Token counts behind the shared beginning that sampling compiles programs for; a prompt costs the smallest that fits.
LENGTH_CLASSES = (64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class GptOssTextConfig:
    """GPT-OSS of a release as the text encoder (report 2): four layers of the conversation around a caption."""

    # A release folder, its conversion, or a file of weights; with the tokenizer.
    path: str = "checkpoints/Lens-Base"
    # Where else the tokenizer is: its folder, its tokenizer.json, or a release folder.
    tokenizer: str = ""
    # Layers whose output is a feature, counted from 0.
    selected: tuple[int, ...] = (5, 11, 17, 23)
    # The day the conversation claims to be, YYYY-MM-DD. It changes the features slightly; the original takes today.
    date: str = harmony.DEFAULT_DATE
    # Tokens of a conversation, 97 before the caption and 22 after it included; longer captions are cut at their end.
    # The report's captions have 109 words on average, about 270 tokens in all. The release reads 512.
    max_conversation: int = harmony.MAX_TOKENS
    # Cut a long conversation at its right end, as the original does, and not in the prompt.
    original_truncation: bool = False
    # Sizes, which must be those of the weights, and what it computes in.
    model: GptOssConfig = GPT_OSS_20B

    @property
    def width(self) -> int:
        return self.model.width

    @property
    def num_layers(self) -> int:
        return len(self.selected)

    @property
    def max_tokens(self) -> int:
        """Tokens of a caption's features: what is behind the shared beginning."""
        return self.max_conversation - harmony.PREFIX_TOKENS

    @property
    def suffix_tokens(self) -> int:
        """What closes a conversation behind the caption."""
        return 0 if self.original_truncation else harmony.SUFFIX_TOKENS

    @property
    def dtype(self) -> str:
        return self.model.dtype

    def __post_init__(self):
        harmony.check_date(self.date)
        gpt_oss.check_taps(self.model, self.selected)
        if self.max_tokens < harmony.SUFFIX_TOKENS:
            least = harmony.PREFIX_TOKENS + harmony.SUFFIX_TOKENS
            raise LensError(f"text.max_conversation is {self.max_conversation}; it must be at least {least}")

    def load(self, mesh: Mesh | None = None, head: bool = False) -> "GptOssEncoder":
        """The encoder; with `head` it can write text as well (the prompt reasoner)."""
        from lens_jax.convert import load

        found, part = load.find_sized(self.path, "text_encoder", self.model, "text")
        encoder = from_part(self, part, find_tokenizer(found, self.tokenizer), mesh, head)
        if encoder.tokenizer is None:
            raise LensError(
                f"text.path {self.path}: no tokenizer; a release has it in tokenizer/, or set text.tokenizer"
            )
        return encoder

    def abstract_params(self, mesh: Any = None) -> dict:
        model = gpt_oss.abstract_params(self.model, head=False)
        prefix = jax.ShapeDtypeStruct((harmony.PREFIX_TOKENS,), jnp.int32)
        prefill = functools.partial(gpt_oss.prefill, self.model, layers=max(self.selected) + 1)
        past = jax.eval_shape(prefill, model, prefix)
        if mesh is not None:
            everywhere = NamedSharding(mesh, PartitionSpec())
            past = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for x in past)
        return {"model": parallel.abstract_params(model, parallel.GPT_OSS_RULES, mesh), "past": past}

    def abstract_inputs(self, captions: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((captions, self.max_tokens), jnp.int32)

    def features(self, params: dict, values: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
        """Of token ids [B, T] behind the beginning whose keys and values are `params["past"]`."""
        mesh = jax.sharding.get_abstract_mesh()
        model, past = params["model"], params["past"]
        access = gpt_oss.WHOLE if mesh.empty else _access(mesh, model)

        def inner(model, past, ids, lengths):
            layers = gpt_oss.hidden_states(self.model, model, ids, lengths, self.selected, past, access)
            # Padding comes out as numbers without meaning; the same zeros as in a cache cost nothing.
            valid = jnp.arange(ids.shape[1]) < lengths[:, None]
            return tuple(jnp.where(valid[..., None], layers, 0))

        if mesh.empty:
            return inner(model, past, values, lengths)
        # Rows over all axes where they go round: else devices along `tensor` would all compute the same.
        home = PartitionSpec(jax.typeof(values).sharding.spec[0])
        rows = PartitionSpec(parallel.AXES) if values.shape[0] % mesh.size == 0 else home
        specs = (parallel.tree_specs(parallel.GPT_OSS_RULES, model, mesh), PartitionSpec(), rows, rows)
        spread = jax.shard_map(inner, in_specs=specs, out_specs=(rows,) * self.num_layers, check_vma=False)
        layers = spread(model, past, jax.reshard(values, rows), jax.reshard(lengths, rows))
        return tuple(jax.reshard(layer, home) for layer in layers)

    def operations(self, tokens: int) -> int:
        return flops.gpt_oss_forward(self.model, tokens, harmony.PREFIX_TOKENS)


class GptOssEncoder:
    """A `TextEncoder`: token ids on the host, features on the devices."""

    def __init__(
        self,
        config: GptOssTextConfig,
        model: dict,
        tokenizer: HarmonyTokenizer | None,
        mesh: Mesh | None = None,
        *,
        digest: str | None = None,
        batch_size: int = 8,
        cache_bytes: int = CACHE_BYTES,
    ):
        """
        Args:
          model: parameters of `models.gpt_oss`, with or without the vocabulary head, laid out on `mesh`.
          tokenizer: without one only blank prompts can be encoded; token ids still can, by `encode_tokens`.
          batch_size: prompts that `encode` takes at a time. With 1 the features of a prompt do not depend, even in the
            last bit, on its company.
          cache_bytes: of features that `encode` keeps, the least recently used given up first; a token takes 23 kB in
            bfloat16.
        """
        if batch_size < 1:
            raise LensError(f"batch_size is {batch_size}; it must be at least 1")
        self.config, self.model, self.tokenizer, self.digest = config, model, tokenizer, digest
        self.width, self.num_layers = config.width, config.num_layers
        self._mesh, self._batch_size = mesh, batch_size
        self._cache, self._lock = Cache(cache_bytes), threading.Lock()
        if tokenizer is None:
            return
        self._frame = harmony.image_frame(config.date)
        self._prefix = tokenizer.encode_pieces(self._frame.prefix)
        least = len(self._prefix) + len(tokenizer.encode_pieces(self._frame.suffix))
        if config.max_conversation < least:
            raise LensError(
                f"text.max_conversation is {config.max_conversation}; this tokenizer needs at least {least}"
            )

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt that are read."""
        return self.config.max_conversation - harmony.PREFIX_TOKENS - harmony.SUFFIX_TOKENS

    @functools.cached_property
    def params(self) -> dict:
        """`model`, and `past`: keys and values [layers, 1, 97, kv_heads, head_dim] of the shared beginning."""
        prefix = parallel.everywhere(np.array(self._prefix, np.int32), self._mesh)
        return {"model": self.model, "past": parallel.on(self._mesh, _prefill)(self.config, self.model, prefix)}

    def tokens(self, captions: Sequence[str]) -> TextInputs:
        suffix = self.tokenizer.encode_pieces(self._frame.suffix)
        whole = lambda caption: self.tokenizer.encode(caption) + suffix
        rows = [whole(caption) if text else [] for caption, text in zip(captions, check_prompts(captions))]
        return TextInputs(*pad(rows, max(map(len, rows), default=0), self.tokenizer.pad_token))

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """T is the length class of the longest prompt.

        A prompt is read as it is, with the blanks around it, as the original does.
        """
        wanted = list({prompt: None for prompt, text in zip(prompts, check_prompts(prompts)) if text})
        if wanted and self.tokenizer is None:
            raise LensError("this text encoder has no tokenizer (a release has it in tokenizer/); give prompt_embeds")
        with self._lock:
            found = self._features(wanted)
        lengths = np.array([found[p].shape[1] if p in found else 0 for p in prompts], np.int32)
        width = self._length_class(int(lengths.max(initial=0)))
        layers = np.zeros((self.num_layers, len(lengths), width, self.width), jnp.dtype(self.config.dtype))
        for row, prompt in enumerate(prompts):
            if prompt in found:
                layers[:, row, : lengths[row]] = found[prompt]
        return TextFeatures(tuple(layers), lengths, self.config.date)

    def _features(self, prompts: list[str]) -> dict[str, np.ndarray]:
        """[layers, tokens, width] of each prompt, from the cache or computed."""
        found = {prompt: self._cache.get(prompt) for prompt in prompts}
        groups = collections.defaultdict(list)
        for prompt in prompts:
            if found[prompt] is None:
                ids = self._ids(prompt)
                groups[self._length_class(len(ids))].append((prompt, ids))
        for width, members in sorted(groups.items()):
            for start in range(0, len(members), self._batch_size):
                chunk = members[start : start + self._batch_size]
                for (prompt, ids), layers in zip(chunk, self._run([ids for _, ids in chunk], width)):
                    found[prompt] = layers[:, : len(ids)].copy()
                    self._cache.put(prompt, found[prompt])
        return found

    def _ids(self, prompt: str) -> list[int]:
        """The ids behind the shared beginning."""
        c = self.config
        ids = encode_prompt(self.tokenizer, self._frame, prompt, c.max_conversation, c.original_truncation)
        return ids[len(self._prefix) :]

    def _length_class(self, tokens: int) -> int:
        return next((n for n in LENGTH_CLASSES if n >= tokens), self.config.max_tokens)

    def _run(self, rows: list[list[int]], width: int) -> np.ndarray:
        """[rows, layers, width, channels] of ids behind the shared beginning."""
        # Powers of two, so that few programs are compiled; an empty row uses no experts, which are 9/10 of the cost.
        batch = min(2 ** (len(rows) - 1).bit_length(), self._batch_size)
        tokens = pad([*rows, *[[]] * (batch - len(rows))], width, self.tokenizer.pad_token)
        placed = (parallel.everywhere(x, self._mesh) for x in tokens)
        layers = parallel.on(self._mesh, _features)(self.config, self.params, *placed)
        return np.stack([np.asarray(layer) for layer in layers], 1)[: len(rows)]


def from_part(
    config: GptOssTextConfig, part, tokenizer: HarmonyTokenizer | None, mesh: Mesh | None = None, head: bool = False
) -> GptOssEncoder:
    """The encoder with the weights of a `convert.source.Part`, whose sizes are those of `config.model`.

    Features need neither the final norm nor the vocabulary head, 1.2 GB of it; text needs both.
    """
    from lens_jax.convert import load

    model = load.params(part, config.model, parallel.GPT_OSS_RULES, mesh, head=head)
    return GptOssEncoder(config, model, tokenizer, mesh, digest=part.digest())


def encode_tokens(
    config: GptOssConfig, model: dict, ids, lengths, selected: tuple[int, ...], past=None, drop: int = 0
) -> jax.Array:
    """Features [len(selected), B, T - drop, width] of ids [B, T] given as such, without their first `drop` positions.

    lengths: int [B], before anything is dropped. LensError for ids that are not in the vocabulary.
    """
    ids, lengths = np.asarray(ids, np.int32), np.asarray(lengths, np.int32)
    if ids.ndim != 2 or lengths.shape != ids.shape[:1]:
        raise LensError(f"token ids are {list(ids.shape)}, lengths {list(lengths.shape)}; [B, T] and [B] are needed")
    if ids.size and not 0 <= ids.min() <= ids.max() < config.vocab:
        raise LensError(f"token ids lie in {ids.min()}..{ids.max()}; the vocabulary has {config.vocab}")
    return _hidden_states(config, tuple(selected), model, ids, lengths, past)[:, :, drop:]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hidden_states(config: GptOssConfig, selected: tuple[int, ...], model, ids, lengths, past):
    return gpt_oss.hidden_states(config, model, ids, lengths, selected, past)


@functools.partial(jax.jit, static_argnums=0)
def _features(config: GptOssTextConfig, params: dict, ids: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
    return config.features(params, ids, lengths)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(config: GptOssTextConfig, model: dict, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of the beginning that all conversations share."""
    mesh = jax.sharding.get_abstract_mesh()
    access = gpt_oss.WHOLE if mesh.empty else _access(mesh, model)
    prefill = lambda model, ids: gpt_oss.prefill(config.model, model, ids, max(config.selected) + 1, access)
    if mesh.empty:
        return prefill(model, ids)
    specs, everywhere = parallel.tree_specs(parallel.GPT_OSS_RULES, model, mesh), PartitionSpec()
    return jax.shard_map(prefill, in_specs=(specs, everywhere), out_specs=everywhere, check_vma=False)(model, ids)


def _access(mesh, model: dict) -> gpt_oss.Access:
    """Weights sharded over `fsdp`, seen from inside `shard_map`."""
    specs = parallel.tree_specs(parallel.GPT_OSS_RULES, model, mesh)

    def whole(spec: PartitionSpec, part: jax.Array) -> jax.Array:
        sharded = [axis for axis, name in enumerate(spec[1:]) if name == "fsdp"]
        return jax.lax.all_gather(part, "fsdp", axis=sharded[0], tiled=True) if sharded else part

    def layer(stack: dict, i: jax.Array) -> tuple[dict, jax.Array]:
        parts = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, 0, keepdims=False), stack)
        is_spec = lambda x: isinstance(x, PartitionSpec)
        gathered = jax.tree.map(whole, specs["layers"], parts, is_leaf=is_spec)
        return jax.tree.map(lambda x: x[None], gathered), jnp.int32(0)

    def embed(model: dict, ids: jax.Array) -> jax.Array:
        table = model["embed"]
        if "fsdp" not in specs["embed"]:
            return table[ids]
        # Every device looks up its channels of everybody's tokens, then channels are exchanged for rows: a thousandth
        # of what it would take to gather the table.
        everybodys = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)
        return jax.lax.all_to_all(table[everybodys], "fsdp", split_axis=0, concat_axis=ids.ndim, tiled=True)

    return gpt_oss.Access(embed, layer)
