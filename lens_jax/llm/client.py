"""The one client of the project for OpenAI-compatible endpoints: judges, captions, prompts and the reasoner ask by it.

The `openai` SDK makes the calls; when a call is made again is decided here, because the SDK knows neither the other
calls in flight nor a budget. Nothing is asked twice: answers are kept by the hash of the question (`cache.py`), so a
run that was killed goes on with what was answered.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import inspect
import queue
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from lens_jax.errors import LensError, LensWarning
from lens_jax.llm.answers import Answers, CachedAnswers
from lens_jax.llm.cache import DiskCache
from lens_jax.llm.endpoint import Endpoint
from lens_jax.llm.gate import Gate
from lens_jax.llm.reply import read_error, read_reply
from lens_jax.llm.request import Answer, Request, Result, Unusable
from lens_jax.llm.retry import Failure, Unreachable, backoff, one_line
from lens_jax.llm.spending import Counts, Spending

# What is sent to a server that is not OpenAI's. The SDK would add the organisation, the project and other headers that
# variables of the environment name, which are meant for OpenAI.
_HEADERS = (
    "host", "accept", "accept-encoding", "connection", "content-type", "content-length", "authorization", "user-agent",
)  # fmt: skip
# Requests handed over ahead of those that may be in flight: enough that none waits for the other thread.
_AHEAD = 2

# Makes a value of the answer to the request of this index, or raises `Unusable`.
Read = Callable[[int, Answer], Any]


@dataclasses.dataclass
class _Asked:
    """A question in flight, and how many wait for its answer."""

    task: asyncio.Task
    waiting: int = 0


class Client:
    """Asks one endpoint, from any thread. Calls run in a thread of their own, which starts with the first.

    `what` says in messages who asks: "the rubric judge". `answers` keeps answers in place of the endpoint's cache, and
    `spent` are the US dollars and tokens that those of earlier runs took.
    """

    def __init__(
        self, endpoint: Endpoint, what: str, answers: Answers | None = None, spent: tuple[float, int] = (0.0, 0)
    ):
        endpoint.require(what)
        # Here and not with the first call: on a busy machine it takes longer than a server may.
        self._openai = import_openai()
        self.endpoint = endpoint
        self._what = what
        self._key = endpoint.key()
        self._extra = endpoint.extra()
        self._length_field = endpoint.length_field
        self._cache = DiskCache(endpoint.cache) if endpoint.cache else None
        self._answers = answers or (CachedAnswers(self._cache) if self._cache else None)
        self._spending = Spending(endpoint, spent)
        pace = endpoint.requests_per_minute, self._spending.room, endpoint.tokens_per_minute
        self._gate = Gate(endpoint.concurrency, *pace)
        self._asked: dict[str, _Asked] = {}
        self._trouble_since: float | None = None
        # Why nothing is asked any more.
        self._stopped: LensError | None = None
        self._stop = asyncio.Event()
        self._sdk = None
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def counts(self) -> Counts:
        """What happened so far: answers, tokens, money, latency."""
        return dataclasses.replace(self._spending.counts)

    @property
    def spent(self) -> tuple[float, int]:
        """US dollars and tokens, of this client and of all before it with the same cache."""
        return self._spending.usd, self._spending.tokens

    @property
    def key(self) -> str:
        """The secret that is sent, which no message may hold."""
        return self._key

    def check(self) -> None:
        """LensError where the key is refused or the cache cannot be written, Unreachable where nothing listens."""
        if self._cache:
            self._cache.check()
        failure, models = self._run(self._look()).result()
        if failure is not None:
            raise LensError(f"{self.endpoint.url}: {self._what} cannot be asked: {failure}")
        if models and self.endpoint.model not in models:
            listed = ", ".join(sorted(models)[:5])
            warnings.warn(
                f"{self.endpoint.url} does not list the model {self.endpoint.model!r}; it lists {listed}",
                LensWarning,
                stacklevel=2,
            )

    def submit(
        self, request: Request, read: Read | None = None, asks: int = 3, index: int = 0
    ) -> concurrent.futures.Future[Result]:
        """Ask one question at once, however many are in flight: see `ask_each`, whose pace is kept.

        Whoever submits has to see that not too many wait. The future holds the result, or the LensError that stops
        everything.
        """
        return self._run(self._answer(index, request, read, asks))

    def call(self, attempt: Callable[[Any], Awaitable[Any]], seconds: float = 0.0) -> Any:
        """What `attempt(sdk)` gives, any call of the API: made again as a question would be, beside the pace of those.

        `seconds` in place of the endpoint's time-out. LensError where it fails for good.
        """
        return self._run(self._persist(attempt, seconds or self.endpoint.timeout_seconds)).result()

    def paid(self, answer: Answer) -> Answer:
        """Count an answer that came on another way than by a question here. Tokens that are not said are 0."""
        answer = self._counted(answer)
        self._spending.add(answer.tokens_in, answer.tokens_out, answer.seconds)
        return answer

    def ask(self, requests: Iterable[Request], read: Read | None = None, asks: int = 3) -> list[Result]:
        """The results of all requests, in their order; see `ask_each`."""
        found = sorted(self.ask_each(requests, read, asks), key=lambda pair: pair[0])
        return [result for _, result in found]

    def ask_each(
        self, requests: Iterable[Request], read: Read | None = None, asks: int = 3
    ) -> Iterator[tuple[int, Result]]:
        """(index, result) of every request, as they come. No more are held than twice the calls in flight.

        `read(index, answer)` makes a value of an answer, or raises `Unusable`: then the model is told so, and asked up
        to `asks` times in all. Without it the value is the answer's text. A request that fails has a result with an
        error. LensError when no request can succeed: a key refused, a budget spent, or Unreachable: a server that is
        gone. What is in flight is waited for, and kept.
        """
        done: queue.SimpleQueue[tuple[int, concurrent.futures.Future]] = queue.SimpleQueue()
        pending: set[concurrent.futures.Future] = set()
        source = enumerate(requests)
        exhausted = False
        try:
            while True:
                while not exhausted and len(pending) < _AHEAD * self.endpoint.concurrency:
                    try:
                        index, request = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    future = self.submit(request, read, asks, index)
                    pending.add(future)
                    future.add_done_callback(lambda future, index=index: done.put((index, future)))
                if not pending:
                    return
                index, future = done.get()
                pending.discard(future)
                yield index, future.result()
        except LensError:
            concurrent.futures.wait(pending)
            raise
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """End the thread. Calls in flight are broken off, and whoever waits for them gets a CancelledError."""
        with self._lock:
            loop, thread, self._loop = self._loop, self._thread, None
            self._closed = True
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
        self._spending.write()

    # What follows runs in the client's own thread.

    def _run(self, coroutine) -> concurrent.futures.Future:
        with self._lock:
            if self._closed:
                coroutine.close()
                raise concurrent.futures.CancelledError("the client was closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._serve, args=(self._loop,), daemon=True, name="llm")
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            if self._sdk is not None:
                loop.run_until_complete(self._sdk.close())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    def _server(self):
        """The SDK's client, made in the thread that uses it."""
        if self._sdk is None:
            self._sdk = self._openai.AsyncOpenAI(
                base_url=self.endpoint.url,
                # The SDK wants a key even for servers that want none.
                api_key=self._key or "none",
                max_retries=0,
                timeout=self.endpoint.timeout_seconds,
                # With `trust_env` a proxy of the environment would see every image; and a server that redirects would
                # have them sent to another.
                http_client=self._openai.DefaultAsyncHttpxClient(
                    trust_env=self.endpoint.proxy,
                    follow_redirects=False,
                    event_hooks={} if self.endpoint.hosted_by_openai else {"request": [_only_ours]},
                ),
            )
        return self._sdk

    async def _look(self) -> tuple[str | None, set[str]]:
        """Whether the server is there: (what is wrong, models that it lists)."""
        try:
            server = self._server()
            async with asyncio.timeout(self.endpoint.timeout_seconds):
                page = await server.models.list()
            return None, {str(model.id) for model in page.data or ()}
        except Exception as error:
            failure = self._failure(error)
            # A server need not list its models, and one that is busy is there: only the key must be right.
            there = failure.status not in (0, 401)
            if failure.kind:
                raise Unreachable(f"{self.endpoint.url}: {self._what} cannot be asked: {failure.reason}") from None
            return (None if there else failure.reason), set()

    async def _answer(self, index: int, request: Request, read: Read | None, asks: int) -> Result:
        """Ask until an answer can be read; what fails is in the result. LensError stops everything."""
        counts = self._spending.counts
        answer, reason = None, ""
        for _ in range(max(1, asks)):
            answer, failure = await self._shared(request)
            if answer is None:
                return Result(error=failure.reason, code=failure.code, status=failure.status, kind=failure.kind)
            if read is None:
                return Result(answer.text, answer)
            try:
                return Result(read(index, answer), answer)
            except Unusable as unusable:
                counts.unusable += 1
                reason = f"{unusable}; the answer was {one_line(answer.text, self._key, 80)!r}"
                request = request.again(answer.text, unusable.repair) if unusable.repair else request.reseeded()
        counts.failed += 1
        return Result(answer=answer, error=f"{reason} (asked {max(1, asks)} times)")

    async def _shared(self, request: Request) -> tuple[Answer | None, Failure | None]:
        """An answer, from the cache, from the same question in flight, or from the server."""
        key = await asyncio.to_thread(request.key, self.endpoint.model, self._extra)
        asked = self._asked.get(key)
        if asked is None:
            asked = self._asked[key] = _Asked(asyncio.get_running_loop().create_task(self._fetch(key, request)))
            asked.task.add_done_callback(lambda _: self._asked.pop(key, None))
        asked.waiting += 1
        try:
            return await asyncio.shield(asked.task)
        finally:
            asked.waiting -= 1
            if not asked.waiting:  # nobody wants it any more
                asked.task.cancel()

    async def _fetch(self, key: str, request: Request) -> tuple[Answer | None, Failure | None]:
        if self._answers:
            kept = await _finished(self._answers.get(key, request))
            if kept is not None:
                self._spending.counts.cached += 1
                return kept, None
        try:
            outcome = await self._call(key, request)
            if isinstance(outcome, Failure):
                if self._answers:
                    await _finished(self._answers.fail(key, request))
                return None, outcome
            if self._answers:
                await _finished(self._answers.put(key, request, outcome))
        except LensError as stop:
            self._stopped = self._stopped or stop
            self._stop.set()
            self._gate.open()
            raise
        return outcome, None

    async def _call(self, key: str, request: Request) -> Answer | Failure:
        """Make the call until it succeeds or is given up."""
        first, tries, failures = None, 0, 0
        while True:
            guessed = self._spending.mean_tokens() or request.tokens()
            async with self._gate.passing(guessed):
                self._refuse_more()
                if first is None and self._answers:
                    await _finished(self._answers.begin(key, request))
                started = time.monotonic()
                first, length_field = first or started, self._length_field
                outcome = await self._try(request, started)
            if isinstance(outcome, Answer):
                self._gate.corrected(guessed, outcome.tokens_in + outcome.tokens_out or guessed)
                return outcome
            if self._other_length_field(outcome, length_field):
                continue
            failures += 1
            tries += outcome.counts
            self._heed(outcome, started)
            too_long = time.monotonic() - first > self.endpoint.give_up_seconds
            if outcome.act == "skip" or tries >= self.endpoint.tries or too_long:
                self._spending.counts.failed += 1
                tried = f" (tried {failures} times)" if failures > 1 else ""
                return dataclasses.replace(outcome, reason=f"{outcome.reason}{tried}")
            self._spending.counts.retried += 1
            await self._sleep(max(outcome.retry_after or 0.0, backoff(self.endpoint.wait_seconds, failures)))

    async def _persist(self, attempt: Callable[[Any], Awaitable[Any]], seconds: float) -> Any:
        first, tries, failures = time.monotonic(), 0, 0
        while True:
            started = time.monotonic()
            try:
                async with asyncio.timeout(seconds):
                    found = await attempt(self._server())
                self._trouble_since = None
                return found
            except LensError:
                raise
            except Exception as error:
                failure = self._failure(error)
            failures += 1
            tries += failure.counts
            self._heed(failure, started)
            too_long = time.monotonic() - first > self.endpoint.give_up_seconds
            if failure.act == "skip" or tries >= self.endpoint.tries or too_long:
                raise LensError(f"{self.endpoint.url}: {failure.reason}")
            self._spending.counts.retried += 1
            await self._sleep(max(failure.retry_after or 0.0, backoff(self.endpoint.wait_seconds, failures)))

    async def _try(self, request: Request, started: float) -> Answer | Failure:
        body = request.body(self.endpoint.model, self._extra, self._length_field)
        server = self._server()
        try:
            # The SDK's own time-out is of each read: a server that sends a byte now and then would never reach it.
            async with asyncio.timeout(self.endpoint.timeout_seconds):
                # Not `chat.completions.create`, which looks at every field of call and reply by its type: a fifth of
                # what a call costs here (5.4 instead of 6.9 ms), and other servers' types are not quite the same.
                reply = await server.post("/chat/completions", cast_to=object, body=body)
            answer = self._counted(read_reply(reply, time.monotonic() - started))
        except LensError:
            raise
        except Exception as error:
            return self._failure(error)
        self._trouble_since = None
        self._gate.answered()
        self._spending.add(answer.tokens_in, answer.tokens_out, answer.seconds)
        return answer

    def _counted(self, answer: Answer) -> Answer:
        """The answer, with no tokens where the server does not say; LensError where a budget needs to know."""
        if answer.tokens_in >= 0:
            return answer
        if self.endpoint.max_usd or self.endpoint.max_tokens:
            raise LensError(f"{self.endpoint.url}: its replies give no usage in tokens, so no budget can be kept")
        return dataclasses.replace(answer, tokens_in=0, tokens_out=0)

    def _failure(self, error: Exception) -> Failure:
        answered = self._spending.counts.answered > 0
        return read_error(self._openai, error, self.endpoint.timeout_seconds, answered, self._key)

    def _heed(self, failure: Failure, started: float) -> None:
        """What a failed call means for all others. LensError where none can succeed, Unreachable where none can now."""
        url, give_up = self.endpoint.url, self.endpoint.give_up_seconds
        if failure.act == "stop":
            raise LensError(f"{url}: {failure.reason}")
        if failure.act == "skip":
            return
        if (failure.retry_after or 0) > give_up:
            raise Unreachable(
                f"{url}: asks to wait {failure.retry_after:,.0f} s, longer than endpoint.give_up_seconds={give_up:g} "
                f"({failure.reason})"
            )
        self._trouble_since = self._trouble_since or started
        if time.monotonic() - self._trouble_since > give_up:
            raise Unreachable(f"{url}: no answer for {give_up:g} s: {failure.reason}")
        if failure.crowded:
            self._gate.crowded(started)
        if failure.retry_after is not None:
            self._gate.pause(failure.retry_after)

    def _refuse_more(self) -> None:
        if self._stopped:
            raise self._stopped
        if self._gate.inside == 1 and (reason := self._spending.exhausted(0)):
            raise LensError(f"{self.endpoint.url}: {reason}; raise it to go on: what was answered is kept")

    async def _sleep(self, seconds: float) -> None:
        """Wait, or until everything stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()

    def _other_length_field(self, failure: Failure, used: str) -> bool:
        """Whether the server wants the older name of the limit than the one `used`; all calls have it from now on."""
        refused = failure.act == "skip" and "max_completion_tokens" in failure.reason
        if refused and used == "max_completion_tokens":
            self._length_field = "max_tokens"
            return True
        return False


async def _only_ours(request) -> None:
    """Take what the SDK has added from the environment out of an HTTP request."""
    for name in {*request.headers} - {*_HEADERS}:
        del request.headers[name]


async def _finished(value: Any | Awaitable[Any]) -> Any:
    return await value if inspect.isawaitable(value) else value


def import_openai():
    """The SDK, or how to get it. It takes a second to import."""
    try:
        import openai
    except ImportError:
        raise LensError('asking a language model needs the extra: pip install "lens-jax[llm]"') from None
    return openai
