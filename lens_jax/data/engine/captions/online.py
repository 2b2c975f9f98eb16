"""Captions one call an image, over the units as one stream: the last image of a unit does not hold up the next unit."""

import concurrent.futures
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from lens_jax.data.engine.captions import english, sent
from lens_jax.data.engine.captions.config import Caption
from lens_jax.data.engine.captions.job import UNDECODABLE, Job
from lens_jax.data.engine.captions.journal import Journal, tokens_spent
from lens_jax.data.engine.captions.unit import UnitCaptions
from lens_jax.data.engine.decode import Limits, Undecodable
from lens_jax.errors import LensError
from lens_jax.llm.client import Client

# Images in hand beside those in flight: being prepared, or waiting for their turn.
_AHEAD = 2
# And no more bytes of files than this, however large they are.
_AHEAD_BYTES = 512 << 20
# Seconds between two signs of life while nothing comes back.
_BEAT = 0.5


class Online:
    """Asks about images. One for each run: clients keep their connections, and the pace of the endpoint."""

    def __init__(self, caption: Caption, journal: Journal, limits: Limits, threads: int = 2):
        english.load()  # not in the thread of the calls, which would miss their answers
        self._caption, self._journal, self._limits = caption, journal, limits
        budgets = any(e is not None and (e.max_usd or e.max_tokens) for e in (caption.endpoint, caption.second))
        spent = tokens_spent(journal.folder) if budgets else {}
        self._clients: dict[bool, Client] = {}
        for second, endpoint in ((False, caption.endpoint), (True, caption.second)):
            if endpoint is not None:
                before = spent.get(endpoint.model, (0, 0))
                what = "the second caption model" if second else "the caption model"
                self._clients[second] = Client(
                    endpoint, what, journal.of_model(endpoint.model), (endpoint.usd(*before), sum(before))
                )
        self._pool = ThreadPoolExecutor(threads)
        self._back: queue.SimpleQueue[tuple[UnitCaptions, Job, concurrent.futures.Future]] = queue.SimpleQueue()
        self._most = _AHEAD * caption.endpoint.concurrency
        self._held = self._bytes = 0
        self._pending: set[concurrent.futures.Future] = set()

    @property
    def clients(self) -> list[Client]:
        """The first model's, and the second's if there is one."""
        return list(self._clients.values())

    def check(self) -> None:
        """LensError where nothing listens, or the key is refused."""
        for client in self.clients:
            client.check()

    def run(
        self,
        units: Iterable[UnitCaptions],
        done: Callable[[UnitCaptions], None],
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Ask about all images of all units; `done(unit)` for each whose images are all through, in any order.

        Units are taken as they are needed. LensError when no question can succeed; what was answered is kept.
        """
        jobs, exhausted = self._jobs(units, done), False
        try:
            while True:
                while not exhausted and self._held < self._most and self._bytes < _AHEAD_BYTES:
                    beat()
                    if (found := next(jobs, None)) is None:
                        exhausted = True
                    else:
                        self._start(*found)
                if not self._held:
                    return
                try:
                    unit, job, future = self._back.get(timeout=_BEAT)
                except queue.Empty:
                    beat()
                    continue
                self._pending.discard(future)
                self._advance(unit, job, future)
                if job.finished:
                    self._held -= 1
                    unit.take(job)
                    if unit.finished:
                        done(unit)
        except LensError:
            concurrent.futures.wait(self._pending)  # in flight, and paid for: the journal has it
            raise

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for client in self.clients:
            client.close()

    def _jobs(self, units: Iterable[UnitCaptions], done) -> Iterator[tuple[UnitCaptions, Job]]:
        for unit in units:
            for job in unit.jobs():
                known = job.fresh()
                # What the journal answers is neither decoded nor asked.
                if known.replay(unit.answers, sent.named(self._caption, job.sha256)) is None:
                    unit.take(known)
                else:
                    yield unit, job
            if unit.finished:  # nothing to ask, or all of it back already
                done(unit)

    def _start(self, unit: UnitCaptions, job: Job) -> None:
        self._held += 1
        self._bytes += len(job.data)
        self._watch(unit, job, self._pool.submit(sent.prepare, self._caption, job.data, job.sha256, self._limits))

    def _ask(self, unit: UnitCaptions, job: Job) -> None:
        read = lambda _, answer: job.read(answer)
        self._watch(unit, job, self._clients[job.second].submit(job.request(), read, self._caption.asks))

    def _watch(self, unit: UnitCaptions, job: Job, future: concurrent.futures.Future) -> None:
        self._pending.add(future)
        future.add_done_callback(lambda future: self._back.put((unit, job, future)))

    def _advance(self, unit: UnitCaptions, job: Job, future: concurrent.futures.Future) -> None:
        """What is next for a job that is back from the pool with its image, or from a client with a result."""
        if job.image is None:
            try:
                job.image = future.result()
            except Undecodable as problem:
                job.fail(UNDECODABLE, str(problem))
        else:
            job.take(future.result())
        if job.data and (job.image is not None or job.finished):
            self._bytes -= len(job.data)
            job.data = b""
        if not job.finished:
            self._ask(unit, job)
