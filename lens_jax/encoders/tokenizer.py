"""Token ids of a prompt inside the Harmony conversation, with the tokenizer of a release folder."""

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lens_jax.encoders import harmony
from lens_jax.encoders.harmony import Control, Frame
from lens_jax.errors import LensError, LensWarning


class TokenIds(NamedTuple):
    """B conversations, right padded."""

    # int32 [B, T].
    ids: np.ndarray
    # int32 [B], the valid tokens of each row.
    lengths: np.ndarray


class HarmonyTokenizer:
    """Text to ids. Control tokens come from us only: the same characters inside a prompt are encoded as plain text.

    The original parses them, so a prompt with `<|end|>` could forge turns and one with `<|return|>` lost its end.
    """

    def __init__(self, plain, control: Mapping[str, int]):
        """`plain` is a `tokenizers.Tokenizer` without added tokens; `control` maps control tokens to their ids."""
        needed = (harmony.START, harmony.MESSAGE, harmony.CHANNEL, harmony.END, harmony.PAD, *harmony.STOP)
        missing = [token for token in needed if token not in control]
        if missing:
            raise LensError(f"tokenizer: no control token {', '.join(missing)}; o200k_harmony is needed")
        self._plain = plain
        self.control = dict(control)
        self.pad_token = self.control[harmony.PAD]
        self.stop_tokens = tuple(self.control[token] for token in harmony.STOP)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "HarmonyTokenizer":
        """From `tokenizer.json` in a folder; LensError for a tokenizer that is not that of the release."""
        path = Path(folder) / "tokenizer.json"
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise LensError('the tokenizer of a release needs one more package: pip install "tokenizers"') from None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            # Without its added tokens the tokenizer cannot turn text into one, whatever flags it was saved with.
            control = {str(token["content"]): int(token["id"]) for token in values["added_tokens"]}
            plain = Tokenizer.from_str(json.dumps({**values, "added_tokens": []}))
        except OSError as error:
            raise LensError(f"{path}: cannot be read: {error.strerror}") from None
        except Exception as error:  # the library raises bare Exceptions
            raise LensError(f"{path}: no tokenizer of the release: {str(error)[:200]}") from None
        plain.no_truncation()
        plain.no_padding()
        tokenizer = cls(plain, control)
        frame = harmony.image_frame(harmony.DEFAULT_DATE)
        lengths = tuple(len(tokenizer.encode_pieces(pieces)) for pieces in frame)
        if lengths != (harmony.PREFIX_TOKENS, harmony.SUFFIX_TOKENS):
            raise LensError(
                f"{path}: the text around a prompt is {lengths[0]} + {lengths[1]} tokens; o200k_harmony gives 97 + 22"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_pieces(self, pieces: Sequence[str]) -> list[int]:
        """Ids of plain text and control tokens in turn."""
        return [i for p in pieces for i in ([self.control[p]] if isinstance(p, Control) else self.encode(p))]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens written out as `<|name|>`."""
        names = {token: name for name, token in self.control.items()}
        parts, run = [], []
        for i in (*map(int, ids), None):
            if i is None or i in names:
                parts.append(self._plain.decode(run) if run else "")
                parts.append("" if i is None else names[i])
                run = []
            else:
                run.append(i)
        return "".join(parts)


def find_tokenizer(found, place: str | Path = "") -> HarmonyTokenizer | None:
    """The tokenizer at `place`, or the one that came with a `convert.source.Source`; None where it has none."""
    from lens_jax.convert import source

    if place:
        return HarmonyTokenizer.from_folder(source.tokenizer_file(Path(place)).parent)
    own = found.tokenizer
    if isinstance(own, bytes):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "tokenizer.json").write_bytes(own)
            return HarmonyTokenizer.from_folder(folder)
    if own:
        return HarmonyTokenizer.from_folder(own.parent)
    beside = found.release and found.release / source.TOKENIZER
    return HarmonyTokenizer.from_folder(beside) if beside and beside.is_dir() else None


def encode_prompt(
    tokenizer: HarmonyTokenizer,
    frame: Frame,
    prompt: str,
    max_tokens: int = harmony.MAX_TOKENS,
    original_truncation: bool = False,
) -> list[int]:
    """Ids of one conversation: the frame around the prompt, at most `max_tokens`.

    A prompt that is too long (393 tokens in the image frame) is cut at its end, with a warning, and what follows it
    stays. With `original_truncation` the whole is cut at the right as the original does: it loses what follows, which
    the denoiser has seen behind every prompt it was trained on.
    """
    prefix, suffix = (tokenizer.encode_pieces(pieces) for pieces in frame)
    ids, budget = tokenizer.encode(prompt), max_tokens - len(prefix) - len(suffix)
    if len(ids) > budget:
        warnings.warn(
            f"the prompt is {len(ids)} tokens, {len(ids) - budget} more than the model reads; its end is cut: "
            f"...{tokenizer.decode(ids[max(budget, 0) :])[:60]!r}",
            LensWarning,
            stacklevel=2,
        )
    if original_truncation:
        return (prefix + ids + suffix)[:max_tokens]
    return prefix + ids[: max(budget, 0)] + suffix


def pad(rows: Sequence[Sequence[int]], width: int, pad_token: int) -> TokenIds:
    """Rows of ids right padded to `width`."""
    ids = np.full((len(rows), width), pad_token, np.int32)
    for target, row in zip(ids, rows):
        target[: len(row)] = row
    return TokenIds(ids, np.array([len(row) for row in rows], np.int32))
