"""The text encoder of the release (LensGptOssEncoder): a prompt, its Harmony conversation, four layers of GPT-OSS."""

import collections
import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lens_jax.encoders import harmony
from lens_jax.encoders.text import TextFeatures, check_prompts
from lens_jax.encoders.tokenizer import HarmonyTokenizer, encode_prompt, pad
from lens_jax.errors import LensError
from lens_jax.models import gpt_oss
from lens_jax.models.gpt_oss import GptOssConfig


@dataclasses.dataclass(frozen=True)
class GptOssEncoderConfig:
    """How GPT-OSS is used as a text encoder. The defaults are those of the released Lens but for the pinned date."""

    # Layers whose output is a feature, counted from 0.
    selected: tuple[int, ...] = (5, 11, 17, 23)
    # The day the conversation claims to be, YYYY-MM-DD. It changes the features slightly; the original takes today.
    date: str = harmony.DEFAULT_DATE
    # Tokens of a conversation, 97 before the prompt and 22 after it included.
    max_tokens: int = harmony.MAX_TOKENS
    # Cut a long conversation at its right end, as the original does, and not in the prompt.
    original_truncation: bool = False
    # Token counts behind the shared beginning that programs are compiled for; a prompt costs the smallest that fits.
    length_classes: tuple[int, ...] = (64, 128, 256, 512)
    # T of a result: the length class of its longest prompt, or always the last class.
    padding: Literal["class", "max"] = "class"
    # Prompts encoded at a time. With 1 the features of a prompt do not depend, even in the last bit, on its company.
    batch_size: int = 8
    # Prompts whose features are kept, the least recently used given up first. In bfloat16 a token takes 23 kB.
    cache_size: int = 1024

    def __post_init__(self):
        harmony.check_date(self.date)
        if list(self.length_classes) != sorted(set(self.length_classes)) or not min(self.length_classes, default=0) > 0:
            raise LensError(f"text.length_classes {self.length_classes} must be rising positive numbers")
        if self.padding not in ("class", "max"):
            raise LensError(f"text.padding is {self.padding!r}; accepted: class, max")
        for name in ("max_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise LensError(f"text.{name} is {getattr(self, name)}; it must be at least 1")
        if self.cache_size < 0:
            raise LensError(f"text.cache_size is {self.cache_size}; it must be at least 0")


class GptOssEncoder:
    """A `TextEncoder`. Safe to call from several threads.

    Every conversation begins with the same 97 tokens, whose features are dropped. Their keys and values are computed
    once, so a prompt costs its own tokens and the 22 behind it, padded to a length class.
    """

    def __init__(
        self, config: GptOssEncoderConfig, model: GptOssConfig, params: dict, tokenizer: HarmonyTokenizer | None
    ):
        """`params` are those of `models.gpt_oss`, with or without the vocabulary head.

        Without a tokenizer only blank prompts can be encoded; token ids still can, by `encode_tokens`.
        """
        gpt_oss.check_taps(model, config.selected)
        self.config, self.model, self.params, self.tokenizer = config, model, params, tokenizer
        self.width, self.num_layers, self.max_tokens = model.width, len(config.selected), config.length_classes[-1]
        self._past = None
        self._cache: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()
        if tokenizer is None:
            return
        self._frame = harmony.image_frame(config.date)
        self._prefix = tokenizer.encode_pieces(self._frame.prefix)
        room = config.max_tokens - len(self._prefix)
        suffix = len(tokenizer.encode_pieces(self._frame.suffix))
        if room < suffix or self.max_tokens < room:
            raise LensError(
                f"text.max_tokens is {config.max_tokens}; with {len(self._prefix)} tokens before and {suffix} behind "
                f"the prompt, accepted: {len(self._prefix) + suffix} to {len(self._prefix) + self.max_tokens}"
            )

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features [B, T, width] of the prompts, T as `config.padding` says; a blank prompt has length 0.

        A prompt is read as it is, with the blanks around it, as the original does.
        """
        wanted = {prompt: None for prompt, text in zip(prompts, check_prompts(prompts)) if text}
        if wanted and self.tokenizer is None:
            raise LensError("this text encoder has no tokenizer (a release has it in tokenizer/); give prompt_embeds")
        with self._lock:
            features = self._features(list(wanted))
        lengths = np.array([features[p].shape[1] if p in features else 0 for p in prompts], np.int32)
        classes, longest = self.config.length_classes, int(lengths.max(initial=0))
        width = classes[-1] if self.config.padding == "max" else classes[np.searchsorted(classes, longest)]
        layers = np.zeros((self.num_layers, len(lengths), width, self.width), jnp.dtype(self.model.dtype))
        for row, prompt in enumerate(prompts):
            if prompt in features:
                layers[:, row, : lengths[row]] = features[prompt]
        return TextFeatures(tuple(layers), lengths, self.config.date)

    def _features(self, prompts: list[str]) -> dict[str, np.ndarray]:
        """[layers, tokens, width] of each prompt, from the cache or computed."""
        known = {prompt: self._cache[prompt] for prompt in prompts if prompt in self._cache}
        groups = collections.defaultdict(list)
        for prompt in prompts:
            if prompt not in known:
                ids = self._token_ids(prompt)
                groups[int(np.searchsorted(self.config.length_classes, len(ids)))].append((prompt, ids))
        for group, members in sorted(groups.items()):
            for start in range(0, len(members), self.config.batch_size):
                chunk = members[start : start + self.config.batch_size]
                outputs = self._run([ids for _, ids in chunk], self.config.length_classes[group])
                known.update({prompt: o[:, : len(ids)].copy() for (prompt, ids), o in zip(chunk, outputs)})
        for prompt in prompts:
            self._cache[prompt] = known[prompt]
            self._cache.move_to_end(prompt)
        while len(self._cache) > self.config.cache_size:
            self._cache.popitem(last=False)
        return known

    def _token_ids(self, prompt: str) -> list[int]:
        """The ids behind the shared beginning."""
        c = self.config
        ids = encode_prompt(self.tokenizer, self._frame, prompt, c.max_tokens, c.original_truncation)
        return ids[len(self._prefix) :]

    def _run(self, rows: list[list[int]], width: int) -> np.ndarray:
        """[rows, layers, width, channels] of ids behind the shared beginning."""
        if self._past is None:
            ids = jnp.array(self._prefix, jnp.int32)
            self._past = _prefill(self.model, self.config.selected[-1] + 1, self.params, ids)
        # Powers of two, so that few programs are compiled; an empty row uses no experts, which are 9/10 of the cost.
        batch = min(2 ** (len(rows) - 1).bit_length(), self.config.batch_size)
        tokens = pad([*rows, *[[]] * (batch - len(rows))], width, self.tokenizer.pad_token)
        layers = encode_tokens(self.model, self.params, *tokens, self.config.selected, past=self._past)
        return np.asarray(layers).swapaxes(0, 1)[: len(rows)]


def encode_tokens(
    model: GptOssConfig, params: dict, ids, lengths, selected: tuple[int, ...], past=None, drop: int = 0
) -> jax.Array:
    """Features [len(selected), B, T - drop, width] of ids [B, T] given as such, without their first `drop` positions.

    lengths: int [B], before anything is dropped. LensError for ids that are not in the vocabulary.
    """
    ids, lengths = np.asarray(ids, np.int32), np.asarray(lengths, np.int32)
    if ids.ndim != 2 or lengths.shape != ids.shape[:1]:
        raise LensError(f"token ids are {list(ids.shape)}, lengths {list(lengths.shape)}; [B, T] and [B] are needed")
    if ids.size and not 0 <= ids.min() <= ids.max() < model.vocab:
        raise LensError(f"token ids lie in {ids.min()}..{ids.max()}; the vocabulary has {model.vocab}")
    return _hidden_states(model, tuple(selected), params, ids, lengths, past)[:, :, drop:]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hidden_states(model: GptOssConfig, selected: tuple[int, ...], params, ids, lengths, past):
    return gpt_oss.hidden_states(model, params, ids, lengths, selected, past)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(model: GptOssConfig, layers: int, params, ids):
    return gpt_oss.prefill(model, params, ids, layers)
