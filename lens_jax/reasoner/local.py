"""The prompt reasoner by GPT-OSS itself, the model that also reads the prompt: nothing leaves the machine.

Beside what features need it takes the head of the vocabulary, 1.16 GB of the 20B model, and 85 MB a prompt at a time
for keys and values. The instructions are read once. What differs from the release: answers are read by token ids, a row
that thinks too long is led to its answer instead of losing it, and the same seed gives the same rewrite.
"""

import dataclasses
import functools
import threading
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lens_jax.diffusion.draw import seed_key
from lens_jax.encoders import harmony
from lens_jax.encoders.gpt_oss import GptOssEncoder
from lens_jax.encoders.text import check_prompts
from lens_jax.encoders.tokenizer import pad
from lens_jax.errors import LensError
from lens_jax.models import gpt_oss
from lens_jax.models.generate import generate
from lens_jax.reasoner import checks, conversation
from lens_jax.reasoner.instructions import INSTRUCTIONS, digest
from lens_jax.reasoner.rewrite import Rewrite

# Tokens of a question that programs are compiled for; a prompt costs the smallest that fits.
LENGTH_CLASSES = (64, 256, 512, 2048)
# Prompts at a time: one, or as many as share a program.
BATCH_SIZES = (1, 4)


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
            raise LensError(
                "the local reasoner works on one device, and these weights are spread over several; rewrite the "
                "prompts first (lens-jax rewrite)"
            )
        self._encoder, self._tokenizer, self._config = encoder, encoder.tokenizer, encoder.config.model
        self._temperature, self._name, self._digest = temperature, name, digest(instructions)
        self._opening = conversation.opening(self._tokenizer, thoughts, limit)
        self._beginning = conversation.beginning(self._tokenizer, instructions, date or encoder.config.date)
        self._lock = threading.Lock()

    @functools.cached_property
    def _past(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the instructions, of all layers."""
        return _prefill(self._config, self._encoder.model, jnp.asarray(self._beginning, jnp.int32))

    def rewrite(self, prompts: Sequence[str], seed: int = 0) -> list[Rewrite]:
        """What becomes of each prompt. The draws of prompt i depend on (seed, i) and nothing else."""
        asked = [i for i, text in enumerate(check_prompts(prompts)) if text]
        found = {i: Rewrite(prompt, prompt, "kept") for i, prompt in enumerate(prompts)}
        questions = {i: conversation.question(self._tokenizer, prompts[i]) for i in asked}
        with self._lock:
            found |= self._ask(prompts, questions, seed)
            again = {
                i: conversation.question_again(self._tokenizer, prompts[i], long.answer, _shorter(long.tokens))
                for i, long in found.items()
                if isinstance(long, _TooLong)
            }
            found |= self._ask(prompts, again, seed, last=True)
        return [found[i] for i in range(len(prompts))]

    def close(self) -> None:
        """Nothing is open."""

    def _ask(self, prompts: Sequence[str], questions: dict[int, list[int]], seed: int, last: bool = False) -> dict:
        """A `Rewrite` of each question, or `_TooLong`, unless it is the `last` time that is asked."""
        found: dict = {}
        classes: dict[int, list[int]] = {}
        for i, ids in questions.items():
            width = next((width for width in LENGTH_CLASSES if len(ids) <= width), 0)
            if width:
                classes.setdefault(width, []).append(i)
            else:
                detail = f"the prompt is {len(ids)} tokens, of which the reasoner reads {LENGTH_CLASSES[-1]}"
                found[i] = self._raw(prompts[i], "too_long", detail)
        for width, members in sorted(classes.items()):
            size = BATCH_SIZES[-1] if len(members) > 1 else 1
            for chunk in (members[k : k + size] for k in range(0, len(members), size)):
                found |= self._written(prompts, questions, chunk, width, size, seed, last)
        return found

    def _written(self, prompts, questions, chunk: list[int], width: int, size: int, seed: int, last: bool) -> dict:
        started = time.perf_counter()
        idle = size - len(chunk)
        ids, lengths = pad([*(questions[i] for i in chunk), *[[]] * idle], width, self._tokenizer.pad_token)
        tokens, counts = generate(
            self._config,
            self._encoder.model,
            ids,
            lengths,
            seed_key(seed),
            max_new_tokens=self._opening.longest,
            temperature=self._temperature,
            stop_tokens=self._tokenizer.stop_tokens,
            pad_token=self._tokenizer.pad_token,
            past=self._past,
            rows=[*chunk, *[0] * idle],
            opening=self._opening,
        )
        took = {"seconds": time.perf_counter() - started}
        found = {}
        for i, row, count in zip(chunk, tokens, counts):
            said = conversation.final(self._tokenizer, row[:count])
            text = checks.normalised(said.text)
            length = len(self._tokenizer.encode(text))
            took |= {"tokens_in": len(self._beginning) + len(questions[i]), "tokens_out": int(count)}
            problem = checks.find(prompts[i], text, tokens=length, most_tokens=harmony.PROMPT_TOKENS)
            if not said.ended and text:
                found[i] = self._raw(prompts[i], "truncated", f"no end within {self._opening.limit} tokens", **took)
            elif problem is None:
                status = "kept" if checks.same(prompts[i], text) else "used"
                drawn = prompts[i] if status == "kept" else text
                found[i] = self._rewrite(prompts[i], drawn, status, **took)
            elif problem.reason == "too_long" and not last:
                found[i] = _TooLong(text, length)
            else:
                found[i] = self._raw(prompts[i], *problem, **took)
        return found

    def _raw(self, prompt: str, reason: str, detail: str, **took) -> Rewrite:
        return self._rewrite(prompt, prompt, "raw", reason=reason, detail=detail, **took)

    def _rewrite(self, prompt: str, text: str, status, **more) -> Rewrite:
        return Rewrite(prompt, text, status, model=self._name, instructions=self._digest, **more)


@dataclasses.dataclass(frozen=True)
class _TooLong:
    """An answer that the text encoder does not read whole."""

    answer: str
    tokens: int


def _shorter(tokens: int) -> str:
    most = harmony.PROMPT_TOKENS
    return f"Your description has {tokens} tokens; at most {most} are read. Give it again in at most {most // 2} words."


@functools.partial(jax.jit, static_argnums=0)
def _prefill(config, params: dict, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gpt_oss.prefill(config, params, ids)
