"""What is asked, and what is answered; and the name of a question, by which its answer is kept."""

import base64
import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lens_jax.llm.retry import Kind

# Part of every key: raised when what a request means changes.
_VERSION = 1
# What an image of 768 pixels square takes of a model with tiles: 85, and 170 for each of four.
_IMAGE_TOKENS = 765
# Of an answer that could not be used, what is shown to the model again.
_REPEATED = 2000


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """An encoded image. Its hash and its text for the wire are made once, however many requests hold it."""

    data: bytes
    # "image/jpeg" or "image/png".
    kind: str
    # A hash of what it was made from and how, in place of one of its bytes: those may change with the encoder.
    made_from: str = ""

    @functools.cached_property
    def digest(self) -> str:
        return self.made_from or hashlib.sha256(self.data).hexdigest()

    @functools.cached_property
    def url(self) -> str:
        return f"data:{self.kind};base64,{base64.b64encode(self.data).decode('ascii')}"


def encode_image(pixels: np.ndarray, short_side: int = 768, quality: int = 90) -> Image:
    """uint8 [H, W, 3] as a JPEG (4:4:4) whose short side is at most `short_side`; 0 keeps the size.

    Vision models with tiles see no more than 768 pixels of the short side. `quality` 0 gives a PNG: exact, and several
    times as large.
    """
    from PIL import Image as Pillow

    image = Pillow.fromarray(np.ascontiguousarray(pixels))
    if short_side and min(image.size) > short_side:
        scale = short_side / min(image.size)
        image = image.resize(tuple(max(1, round(side * scale)) for side in image.size), Pillow.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if quality:
        image.save(buffer, "jpeg", quality=quality, subsampling=0)
    else:
        image.save(buffer, "png")
    return Image(buffer.getvalue(), "image/jpeg" if quality else "image/png")


@dataclasses.dataclass(frozen=True)
class Message:
    """A turn of a conversation: "system", "user" or "assistant", and its texts and images in order."""

    role: str
    parts: tuple[str | Image, ...]


@dataclasses.dataclass(frozen=True)
class Request:
    """One call of `/v1/chat/completions`."""

    messages: tuple[Message, ...]
    # Longest answer, in tokens; of a model that reasons, with its reasoning.
    max_tokens: int
    # None leaves it to the server.
    temperature: float | None = None
    # Ask for the probabilities of so many likeliest tokens at each place; 0 asks for none.
    top_logprobs: int = 0
    # Of the server's sampling. None leaves it to the server.
    seed: int | None = None
    # Where its answer belongs, for whoever keeps answers; no part of the question.
    about: str = ""

    def key(self, model: str, arguments: Mapping[str, Any]) -> str:
        """Hex SHA-256 of all that the answer depends on. The server's address is not in it: servers move."""
        plain = lambda part: part if isinstance(part, str) else {"image": part.digest}
        values = {
            "version": _VERSION,
            "model": model,
            "arguments": arguments,
            "messages": [[message.role, [plain(part) for part in message.parts]] for message in self.messages],
            "limits": [self.max_tokens, self.temperature, self.top_logprobs],
        }
        if self.seed is not None:
            values["seed"] = self.seed
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def body(self, model: str, arguments: Mapping[str, Any], length_field: str) -> dict[str, Any]:
        """The fields of the call."""
        body: dict[str, Any] = {"model": model, "messages": [_wire(m) for m in self.messages]}
        body[length_field] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.seed is not None:
            body["seed"] = self.seed
        if self.top_logprobs:
            body.update(logprobs=True, top_logprobs=self.top_logprobs)
        return {**body, **arguments}

    def again(self, answer: str, repair: str) -> "Request":
        """The conversation gone on: the answer that could not be used, and what is wanted instead.

        At temperature 0 the same question would only get the same answer.
        """
        said = Message("assistant", (answer.strip()[:_REPEATED] or "(nothing)",))
        return dataclasses.replace(self, messages=(*self.messages, said, Message("user", (repair,))))

    def reseeded(self) -> "Request":
        """The same question with the next seed, for another answer."""
        return dataclasses.replace(self, seed=(self.seed or 0) + 1)

    def tokens(self) -> int:
        """Tokens that it may take, its answer included: a guess for before anything was answered."""
        texts = sum(len(part) for m in self.messages for part in m.parts if isinstance(part, str))
        images = sum(not isinstance(part, str) for m in self.messages for part in m.parts)
        return texts // 4 + _IMAGE_TOKENS * images + self.max_tokens


def _wire(message: Message) -> dict[str, Any]:
    if all(isinstance(part, str) for part in message.parts):
        return {"role": message.role, "content": "\n\n".join(message.parts)}  # the form that every server knows
    parts = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": part.url}}
        for part in message.parts
    ]
    return {"role": message.role, "content": parts}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a server said."""

    text: str
    # "stop", "length", "content_filter", as the server names it.
    finish_reason: str = ""
    # Why it would not answer, where it says so apart from the text.
    refusal: str = ""
    # (token, log-probability) of the likeliest tokens at each place, if they were asked for.
    top_logprobs: tuple[tuple[tuple[str, float], ...], ...] = ()
    tokens_in: int = 0
    tokens_out: int = 0
    # Of the call that was answered, from its start to the whole answer.
    seconds: float = 0.0


def answer_to_json(answer: Answer) -> dict[str, Any]:
    return dataclasses.asdict(answer)


def answer_from_json(values: Any) -> Answer | None:
    """The answer that was kept, or None where this is not one."""
    kinds = {"text": str, "finish_reason": str, "refusal": str, "tokens_in": int, "tokens_out": int}
    if not isinstance(values, dict) or not all(type(values.get(name)) is kind for name, kind in kinds.items()):
        return None
    try:
        top = tuple(tuple((str(t), float(p)) for t, p in place) for place in values.get("top_logprobs", ()))
        return Answer(**{name: values[name] for name in kinds}, top_logprobs=top, seconds=float(values["seconds"]))
    except (KeyError, TypeError, ValueError):
        return None


class Unusable(Exception):
    """Raised by what reads an answer: it is none.

    `repair` tells the model what is wanted instead. Where it is empty the question is asked afresh, with another seed.
    """

    def __init__(self, reason: str, repair: str = ""):
        super().__init__(reason)
        self.repair = repair


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a request: a value, or why there is none."""

    # What was read from the answer.
    value: Any = None
    answer: Answer | None = None
    # One line; None where there is a value.
    error: str | None = None
    # What the server calls the error, such as "content_filter".
    code: str = ""
    # Of the HTTP reply that was the error, and how the last call failed where there was none: see `retry.Failure`.
    status: int = 0
    kind: Kind = ""
