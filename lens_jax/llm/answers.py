"""Where answers are kept for the client: the protocol, and the endpoint's cache behind it."""

import asyncio
from typing import Protocol

from lens_jax.llm.cache import DiskCache
from lens_jax.llm.request import Answer, Request, answer_from_json, answer_to_json


class Answers(Protocol):
    """Keeps answers by the key of their question. An answer is put before anybody hears of it.

    Called in the client's own thread, so a method must not take long, or be a coroutine.
    """

    def get(self, key: str, request: Request) -> Answer | None:
        """The answer that was put."""

    def begin(self, key: str, request: Request) -> None:
        """The question is about to be asked: it may be paid for from now on."""

    def put(self, key: str, request: Request, answer: Answer) -> None:
        """It was answered."""

    def fail(self, key: str, request: Request) -> None:
        """There will be no answer to what was begun, and nothing to pay."""


class CachedAnswers:
    """The endpoint's cache as `Answers`, read and written in other threads: a disk may be slow."""

    def __init__(self, cache: DiskCache):
        self._cache = cache

    async def get(self, key: str, request: Request) -> Answer | None:
        return answer_from_json(await asyncio.to_thread(self._cache.get, key))

    def begin(self, key: str, request: Request) -> None:
        """Two runs may share a cache: nothing is known of who began what."""

    async def put(self, key: str, request: Request, answer: Answer) -> None:
        await asyncio.to_thread(self._cache.put, key, answer_to_json(answer))

    def fail(self, key: str, request: Request) -> None:
        """Asked again by the next run."""
