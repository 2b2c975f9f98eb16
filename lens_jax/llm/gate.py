"""How many calls are in flight at once, and when the next may begin."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable


class Gate:
    """Lets calls through: at most `limit` at once, no sooner than the pace and the server's pauses allow.

    `limit` follows the server as TCP follows a network: halved when it is crowded, raised by one for every `limit`
    answers. Of calls that were begun together only the first complaint counts. `room(calls in flight)` says whether
    one more can be paid for.

    The pace is even, without bursts: after a call the next one waits for the time that a request takes of a minute's
    requests, or its tokens of a minute's tokens, whichever is longer. Tokens are guessed when a call begins, and
    `corrected` when they are known.
    """

    def __init__(
        self,
        concurrency: int,
        requests_per_minute: float,
        room: Callable[[int], bool],
        tokens_per_minute: float = 0.0,
    ):
        self.limit = float(concurrency)
        self._most = concurrency
        self._room = room
        self._spacing = 60 / requests_per_minute if requests_per_minute else 0.0
        self._token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._inside = 0
        self._next_start = self._resume = self._shrunk = 0.0
        self._changed = asyncio.Condition()

    @property
    def inside(self) -> int:
        """Calls in flight."""
        return self._inside

    @contextlib.asynccontextmanager
    async def passing(self, tokens: float = 0.0) -> AsyncIterator[None]:
        """Waits for its turn; inside the block the call, of about so many tokens, is in flight."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._inside < int(self.limit) and self._room(self._inside))
            self._inside += 1
        try:
            while (wait := self._wait()) > 0:
                await asyncio.sleep(min(wait, 1.0))
            self._next_start = time.monotonic() + max(self._spacing, tokens * self._token)
            yield
        finally:
            async with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def _wait(self) -> float:
        return max(self._resume, self._next_start) - time.monotonic()

    def pause(self, seconds: float) -> None:
        """No call begins for so long."""
        self._resume = max(self._resume, time.monotonic() + seconds)

    def corrected(self, guessed: float, tokens: float) -> None:
        """A call took so many tokens, and not as many as were guessed."""
        self._next_start += (tokens - guessed) * self._token

    def open(self) -> None:
        """End all pauses, and with them the waiting of those that have only to hear that all is over."""
        self._resume = self._next_start = 0.0
        self._spacing = self._token = 0.0

    def crowded(self, begun: float) -> None:
        """The server had too many calls, among them one begun at this time of `time.monotonic`."""
        if begun > self._shrunk:
            self._shrunk = time.monotonic()
            self.limit = max(1.0, self.limit / 2)

    def answered(self) -> None:
        self.limit = min(float(self._most), self.limit + 1 / self.limit)
