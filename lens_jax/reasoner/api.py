"""A reasoner behind an OpenAI-compatible endpoint, hosted or one's own: prompts are sent there, and nothing else is.

What goes wrong with one prompt, by its answer or by the server, leaves that prompt as it was written: an image is drawn
all the same. Only what no prompt survives is raised.
"""

import collections
import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence

from lens_jax.encoders import harmony
from lens_jax.encoders.text import check_prompts
from lens_jax.errors import LensError
from lens_jax.llm.client import Client
from lens_jax.llm.endpoint import Endpoint
from lens_jax.llm.request import Answer, Message, Request, Result, Unusable
from lens_jax.llm.retry import REFUSED, Unreachable, one_line
from lens_jax.reasoner import checks
from lens_jax.reasoner.instructions import INSTRUCTIONS, digest
from lens_jax.reasoner.rewrite import REASONS, Rewrite, Status

_WHAT = "the prompt reasoner"
OPENAI = "https://api.openai.com/v1"
# A rewrite that is too long is asked for once more.
_ASKS = 2
_SHORTER = (
    "That prompt has {tokens} tokens, and no more than {most} can be read. Shorten it to fit: keep every quoted text "
    "and every number, and leave out the least important details. Answer with the prompt and nothing else."
)
# What a model that reasons aloud puts before its answer; all of it, where it never came to one.
_THOUGHT = re.compile(r"\A\s*<think>(?:.*?</think>|.*)", re.DOTALL)
# Reasons that lie with the server, and not with what the model wrote.
_OF_SERVER = ("timeout", "unreachable", "bad_reply", "rate_limited")


def default_endpoint(url: str = "", model: str = "gpt-5.5", **changes) -> Endpoint:
    """How a reasoner asks: someone waits for each answer, so little is waited for. `changes` are of `Endpoint`."""
    ours = {"concurrency": 8, "timeout_seconds": 60.0, "tries": 3, "give_up_seconds": 60.0}
    return Endpoint(url=url or OPENAI, model=model, **{**ours, **changes})


class ApiReasoner:
    """Asks a language model for rewrites; from any thread, several at a time.

    `count` counts tokens as the text encoder does, of which it reads `most_tokens`. Without it they are guessed, rather
    too few than too many. `max_tokens` bounds an answer, the model's own thoughts included; `temperature` None leaves
    it to the server. With `strict` a prompt that the server fails at is an error, where it else is drawn as written.

    LensError where the endpoint is none, its key is not set or the SDK is missing.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        instructions: str = INSTRUCTIONS,
        *,
        max_tokens: int = 1024,
        temperature: float | None = None,
        count: Callable[[str], int] | None = None,
        most_tokens: int = harmony.PROMPT_TOKENS,
        strict: bool = False,
    ):
        self.endpoint = endpoint
        self._instructions = instructions
        self._max_tokens, self._temperature = max_tokens, temperature
        self._count, self._most_tokens = count or about, most_tokens
        self._strict = strict
        self._made_by = {"model": endpoint.model, "instructions": digest(instructions)}
        self._lock = threading.Lock()
        # How many calls of ours use each client.
        self._users: collections.Counter[Client] = collections.Counter()
        self._spent = (0.0, 0)
        self._client: Client | None = Client(endpoint, _WHAT)

    def check(self) -> None:
        """LensError where the key is refused or the cache cannot be written, Unreachable where nothing listens."""
        with self._lent() as client:
            client.check()

    def rewrite(self, prompts: Sequence[str], seed: int = 0) -> list[Rewrite]:
        """What becomes of each prompt, in their order.

        `seed` is not sent: not every model takes one, and none promises the same answer for it. What gives the same
        rewrite again is the endpoint's cache.

        LensError where no prompt can be rewritten: the key refused, a wrong address or model, a budget spent; with
        `strict` also where the server fails at one, or is gone; and for what is no text, before anything is sent.
        """
        check_prompts(prompts)
        # Each once: without a cache the client knows only which questions are in flight together.
        asked = list(dict.fromkeys(prompt for prompt in prompts if prompt.strip()))
        found = dict(zip(asked, self._ask(asked) if asked else ()))
        return [found.get(prompt) or Rewrite(prompt, prompt, "kept") for prompt in prompts]

    def close(self) -> None:
        """End the connections. Whoever still waits for an answer gets a CancelledError."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _ask(self, prompts: Sequence[str]) -> list[Rewrite]:
        found: dict[int, Rewrite] = {}
        gone = ""

        def read(index: int, answer: Answer) -> None:
            # Kept here and not by the loop below, which never sees what was in flight when the server was given up.
            first = index not in found
            found[index] = made = self._read(prompts[index], answer)
            if made.reason == "too_long" and first:
                tokens = self._count(_final(answer))
                raise Unusable(made.detail, _SHORTER.format(tokens=tokens, most=self._most_tokens))

        try:
            with self._lent() as client:
                for index, result in client.ask_each(map(self._request, prompts), read, _ASKS):
                    if result.error is not None:
                        found[index] = self._raw(prompts[index], reason_of(result), result.error)
        except Unreachable as error:
            if self._strict:
                raise
            # Without the address, which is not for those who only see what became of their prompt.
            gone = str(error).removeprefix(f"{self.endpoint.url}: ")
        rewrites = [found.get(i) or self._raw(prompt, "unreachable", gone) for i, prompt in enumerate(prompts)]
        if self._strict:
            self._refuse_failed(rewrites)
        return rewrites

    def _request(self, prompt: str) -> Request:
        messages = Message("system", (self._instructions,)), Message("user", (prompt,))
        return Request(messages, self._max_tokens, self._temperature)

    def _read(self, prompt: str, answer: Answer) -> Rewrite:
        filtered = "by the content filter" if answer.finish_reason == "content_filter" else ""
        refusal = answer.refusal or filtered
        if answer.finish_reason == "length" and not refusal:
            return self._raw(prompt, "truncated", f"no end within {self._max_tokens} tokens", answer)
        try:
            answer.text.encode()
        except UnicodeEncodeError:  # JSON may hold half a character
            return self._raw(prompt, "bad_reply", "the answer is no valid Unicode", answer)
        text = _final(answer)
        tokens = self._count(text)
        problem = checks.find(prompt, text, tokens=tokens, most_tokens=self._most_tokens, refusal=refusal)
        if problem is not None:
            return self._raw(prompt, problem.reason, problem.detail, answer)
        return self._made(prompt, "kept" if checks.same(prompt, text) else "used", answer, text)

    def _raw(self, prompt: str, reason: str, detail: str, answer: Answer | None = None) -> Rewrite:
        return self._made(prompt, "raw", answer, reason=reason, detail=one_line(detail))

    def _made(self, prompt: str, status: Status, answer: Answer | None = None, text: str = "", **why: str) -> Rewrite:
        cost = {name: getattr(answer, name) for name in ("tokens_in", "tokens_out", "seconds")} if answer else {}
        return Rewrite(prompt, text if status == "used" else prompt, status, **self._made_by, **cost, **why)

    def _refuse_failed(self, rewrites: Sequence[Rewrite]) -> None:
        for made in rewrites:
            if made.reason in _OF_SERVER:
                start = one_line(made.prompt, longest=40)
                why = f"{REASONS[made.reason]} ({made.detail})"
                raise LensError(f"{self.endpoint.url}: no rewrite of {start!r}: {why}")

    @contextlib.contextmanager
    def _lent(self) -> Iterator[Client]:
        """The client that all calls share.

        One that gave the server up, or was refused, asks nothing any more. So that a server which is well again is
        asked again, the next call has a new one; the old one is closed by the last that waits for it.
        """
        with self._lock:
            if self._client is None:
                self._client = Client(self.endpoint, _WHAT, spent=self._spent)
            client = self._client
            self._users[client] += 1
        try:
            yield client
        except LensError:
            with self._lock:
                if self._client is client:
                    self._client = None
                    # With a cache, the account of what was spent lies there.
                    self._spent = self._spent if self.endpoint.cache else client.spent
            raise
        finally:
            with self._lock:
                self._users[client] -= 1
                last = not self._users[client] and self._client is not client
                if last:
                    del self._users[client]
            if last:
                client.close()


def _final(answer: Answer) -> str:
    return checks.normalised(_THOUGHT.sub("", answer.text))


def reason_of(result: Result) -> str:
    """The reason, of REASONS, for a result with an error."""
    if result.code in REFUSED:
        return "refused"
    if result.kind:
        return result.kind
    if result.status == 429:
        return "rate_limited"
    if result.status == 408:
        return "timeout"
    # What else a server says of one question, such as a field that its model does not take, is no answer to it.
    return "unreachable" if result.status >= 500 else "bad_reply"


def about(text: str) -> int:
    """About how many tokens a text has, rather too few than too many.

    `caption_length.estimate` errs the other way, by 1.6 in English and by up to 3.6 in scripts of longer characters, so
    a rewrite that fits would be refused. One that is too long only loses its end in the encoder; in Chinese, with 2.8
    bytes a token, half of it may go unseen.
    """
    size = len(text.encode())
    return size // (5 if size <= 1.1 * len(text) else 6)
