"""The prompt reasoner by GPT-OSS itself, the model that also reads the prompt: nothing leaves the machine.

Beside what features need it takes the head of the vocabulary, 1.16 GB of the 20B model, and 58 to 105 MB a prompt at a
time for keys and values. The instructions are read once. What differs from the release: answers are read by token ids,
a row that thinks too long is led to its answer instead of losing it, and the seed decides the draws.
"""

import functools
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lens_jax.diffusion.draw import seed_key
from lens_jax.encoders.gpt_oss import GptOssEncoder
from lens_jax.encoders.text import check_prompts
from lens_jax.encoders.tokenizer import pad
from lens_jax.errors import LensError
from lens_jax.models import gpt_oss
from lens_jax.models.generate import generate
from lens_jax.reasoner import checks, conversation
from lens_jax.reasoner.instructions import INSTRUCTIONS, digest
from lens_jax.reasoner.rewrite import ONE_DEVICE, Rewrite, Status

# Tokens of a question that programs are compiled for, and how many prompts of it are written at a time; a prompt costs
# the smallest that fits. Of the longest, the logits of attention alone take 0.6 GB each in the 20B model.
LENGTH_CLASSES = {64: 4, 256: 4, 512: 4, 1024: 1}


class LocalReasoner:
    """A `Reasoner`. Safe to call from several threads, one at a time."""

    def __init__(
        self,
        encoder: GptOssEncoder,
        instructions: str = INSTRUCTIONS,
        *,
        date: str = "",
        temperature: float = 0.7,
        thoughts: int = 256,
        limit: int = 512,
        name: str = "gpt-oss",
    ):
        """
        Args:
          encoder: with its tokenizer and the head of its vocabulary (`GptOssTextConfig.load(head=True)`).
          date: the day the conversation claims to be, by default the encoder's.
          temperature: as the release; 0 always takes the likeliest token.
          thoughts: tokens that the model may write before its answer.
          limit: tokens of an answer; what is longer counts as truncated.
          name: of the model, for a rewrite's record.
        """
        if encoder.tokenizer is None:
            raise LensError("the local reasoner needs the tokenizer of a release (tokenizer/), and there is none")
        if "unembed" not in encoder.model:
            raise LensError(
                "the local reasoner needs the text encoder's vocabulary head, which features do not: load it "
                '(reasoner="local")'
            )
        if len(encoder.model["unembed"].sharding.device_set) > 1:
            raise LensError(ONE_DEVICE)
        self._encoder, self._tokenizer, self._config = encoder, encoder.tokenizer, encoder.config.model
        self._temperature, self._name, self._digest = temperature, name, digest(instructions)
        self._opening = conversation.opening(self._tokenizer, thoughts, limit)
        self._most = encoder.prompt_tokens
        self._beginning = conversation.beginning(self._tokenizer, instructions, date or encoder.config.date)
        self._lock = threading.Lock()

    @functools.cached_property
    def _past(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the instructions, of all layers."""
        return _prefill(self._config, self._encoder.model, jnp.asarray(self._beginning, jnp.int32))

    def rewrite(self, prompts: Sequence[str], seed: int = 0) -> list[Rewrite]:
        """What becomes of each prompt. The draws of prompt i are those of (seed, i), whatever is asked beside it.

        In bfloat16 the sums of another batch size may differ in the last bit, and so, now and then, a token.
        """
        key = seed_key(seed)
        asked = [i for i, text in enumerate(check_prompts(prompts)) if text]
        found = {i: Rewrite(prompt, prompt, "kept") for i, prompt in enumerate(prompts)}
        with self._lock:
            first = {i: conversation.question(self._tokenizer, prompts[i]) for i in asked}
            answers = self._ask(first, key)
            found |= {i: self._judged(prompts[i], first[i], answers.get(i)) for i in asked}
            again = {
                i: conversation.question_again(self._tokenizer, prompts[i], answers[i].text, self._shorter(answers[i]))
                for i in answers
                if found[i].reason == "too_long"
            }
            for i, answer in self._ask(again, key).items():
                found[i] = self._judged(prompts[i], again[i], answer, found[i])
        return [found[i] for i in range(len(prompts))]

    def close(self) -> None:
        """Nothing is open."""

    def _ask(self, questions: dict[int, list[int]], key: jax.Array) -> dict[int, "_Answer"]:
        """What is written of each question, but for those that are too long to be read."""
        classes: dict[int, list[int]] = {}
        for i, ids in questions.items():
            width = next((width for width in LENGTH_CLASSES if len(ids) <= width), None)
            classes.setdefault(width, []).append(i)
        classes.pop(None, None)
        found = {}
        for width, members in sorted(classes.items()):
            # One alone has a program of its own, which does not read the weights of idle rows.
            size = LENGTH_CLASSES[width] if len(members) > 1 else 1
            for start in range(0, len(members), size):
                found |= self._written(questions, members[start : start + size], width, size, key)
        return found

    def _written(self, questions, rows: list[int], width: int, size: int, key: jax.Array) -> dict[int, "_Answer"]:
        started = time.perf_counter()
        idle = size - len(rows)
        ids, lengths = pad([*(questions[i] for i in rows), *[[]] * idle], width, self._tokenizer.pad_token)
        tokens, counts = generate(
            self._config,
            self._encoder.model,
            ids,
            lengths,
            key,
            max_new_tokens=self._opening.longest,
            temperature=self._temperature,
            stop_tokens=self._tokenizer.stop_tokens,
            pad_token=self._tokenizer.pad_token,
            past=self._past,
            rows=[*rows, *[0] * idle],
            opening=self._opening,
        )
        seconds = time.perf_counter() - started
        found = {}
        for i, row, count in zip(rows, tokens, counts):
            said = conversation.final(self._tokenizer, row[:count])
            text = checks.normalised(said.text)
            found[i] = _Answer(text, said.ended, len(self._tokenizer.encode(text)), int(count), seconds)
        return found

    def _judged(
        self, prompt: str, question: list[int], answer: "_Answer | None", before: Rewrite | None = None
    ) -> Rewrite:
        """The rewrite that an answer is; what it took, with what was taken `before`."""
        if answer is None:
            detail = f"the prompt is {len(question)} tokens, and the reasoner reads {max(LENGTH_CLASSES)}"
            return self._made(prompt, prompt, "raw", reason="too_long", detail=detail)
        read = len(self._beginning) + len(question)
        took = {
            "tokens_in": read + (before.tokens_in if before else 0),
            "tokens_out": answer.written + (before.tokens_out if before else 0),
            "seconds": answer.seconds + (before.seconds if before else 0),
        }
        problem = checks.find(prompt, answer.text, tokens=answer.tokens, most_tokens=self._most)
        if answer.text and not answer.ended:
            detail = f"no end within {self._opening.limit} tokens"
            return self._made(prompt, prompt, "raw", reason="truncated", detail=detail, **took)
        if problem is not None:
            return self._made(prompt, prompt, "raw", reason=problem.reason, detail=problem.detail, **took)
        if checks.same(prompt, answer.text):
            return self._made(prompt, prompt, "kept", **took)
        return self._made(prompt, answer.text, "used", **took)

    def _made(self, prompt: str, text: str, status: Status, **more) -> Rewrite:
        return Rewrite(prompt, text, status, model=self._name, instructions=self._digest, **more)

    def _shorter(self, answer: "_Answer") -> str:
        return (
            f"Your description has {answer.tokens} tokens; at most {self._most} are read. "
            f"Give it again in at most {self._most // 2} words."
        )


class _Answer(NamedTuple):
    """What the model wrote of one question."""

    text: str
    ended: bool
    # Of the text.
    tokens: int
    # In all, its thoughts included.
    written: int
    seconds: float


@functools.partial(jax.jit, static_argnums=0)
def _prefill(config, params: dict, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gpt_oss.prefill(config, params, ids)
