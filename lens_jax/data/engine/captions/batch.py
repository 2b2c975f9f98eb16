"""Captions by the batch API. It fills the journal; what is left then (refusals for the second model, a few that got no
answer) and the tables themselves are made as online.

Rounds: in each, every question of a unit without an answer goes into files, and when these have ended the next round
asks what their answers leave open. Which questions are in which file stands in the journal before the file is sent, so
a process that goes on after a kill waits for the files that are there.
"""

import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from lens_jax.data.engine.captions import forecast, sent
from lens_jax.data.engine.captions.config import Caption
from lens_jax.data.engine.captions.job import Job
from lens_jax.data.engine.captions.online import Online
from lens_jax.data.engine.captions.unit import UnitCaptions
from lens_jax.data.engine.decode import Limits, Undecodable
from lens_jax.data.engine.threads import in_order
from lens_jax.errors import LensError
from lens_jax.llm import batch as api
from lens_jax.llm.client import Client
from lens_jax.llm.request import Answer, Request
from lens_jax.llm.retry import Failure

# Rounds in which a question may go without an answer, and the share of a unit's questions that may then be left to be
# asked online, at another price.
_ROUNDS, _LEFT = 3, 0.05
# A batch that has not ended so long after its window is given up.
_LONGEST = 30 * 3600.0
# So many in turn that the server has no place for are no passing crowd.
_CROWDED = 100


@dataclass(eq=False)
class _Sent:
    """A file of questions at the server."""

    name: str
    keys: tuple[str, ...]
    file: str = ""
    batch: str = ""
    since: float = field(default_factory=time.time)
    # US dollars and tokens that it may take at most.
    usd: float = 0.0
    tokens: int = 0


@dataclass(eq=False)
class _Unit:
    unit: UnitCaptions
    running: dict[str, _Sent] = field(default_factory=dict)
    # How often each key was sent without an answer, in this process; those that will get none.
    tries: Counter[str] = field(default_factory=Counter)
    given_up: set[str] = field(default_factory=set)


class Batched:
    """Has the interface of `Online`, and one of it for what no batch is for."""

    def __init__(self, caption: Caption, online: Online, limits: Limits):
        self._caption, self._online, self._limits = caption, online, limits
        self._client: Client = online.clients[0]
        self._api = api.Batches(self._client)
        self._units: list[_Unit] = []
        # Units whose next round waits: for a place among the batches, or until the server has less to do.
        self._waiting: deque[_Unit] = deque()
        self._crowded_until, self._crowded_times = 0.0, 0
        # The budget holds no further file: until one that is running has ended and was cheaper than it might have been,
        # or, where none is running, for good.
        self._held_back, self._spent_out = False, ""

    def run(
        self,
        units: Iterable[UnitCaptions],
        done: Callable[[UnitCaptions], None],
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """As `Online.run`. Stops with a LensError when the budget is used up, after all that was sent has come back."""
        ready: deque[UnitCaptions] = deque()
        units, exhausted = iter(units), False
        while True:
            while not exhausted and not self._stuck and not self._waiting and self._places() > 0:
                if (unit := next(units, None)) is None:
                    exhausted = True
                    break
                beat()
                entry = _Unit(unit)
                self._units.append(entry)
                self._resume(entry)
                if not entry.running:
                    self._waiting.append(entry)
                self._send_waiting(ready, beat)
            self._send_waiting(ready, beat)
            if ready:
                found, ready = list(ready), deque()
                self._online.run(found, done, beat)
            if not any(entry.running for entry in self._units) and (self._spent_out or not self._waiting):
                if self._spent_out:
                    raise LensError(self._spent_out)
                if exhausted:
                    return
                continue
            self._pause(beat)
            for entry in self._units:
                for one in list(entry.running.values()):
                    self._look(entry, one)
                if not entry.running and entry not in self._waiting:
                    self._waiting.append(entry)

    @property
    def _stuck(self) -> bool:
        return self._held_back or bool(self._spent_out)

    @property
    def clients(self) -> list[Client]:
        """Those of `Online`."""
        return self._online.clients

    def check(self) -> None:
        """As `Online.check`."""
        self._online.check()

    def close(self) -> None:
        """As `Online.close`. Batches that are running go on at the server."""
        self._online.close()

    def _places(self) -> int:
        return self._caption.batches - sum(len(entry.running) for entry in self._units)

    def _pause(self, beat: Callable[[], None]) -> None:
        end = time.monotonic() + self._caption.poll_seconds
        while (left := end - time.monotonic()) > 0:
            beat()
            time.sleep(min(left, 0.5))

    def _send_waiting(self, ready: deque[UnitCaptions], beat: Callable[[], None]) -> None:
        """The next round of those that wait; units without open questions go to `ready`."""
        while self._waiting and self._places() > 0 and time.monotonic() >= self._crowded_until and not self._stuck:
            entry = self._waiting.popleft()
            if self._send(entry, beat):
                continue
            if self._stuck:
                self._waiting.appendleft(entry)
            else:
                self._units.remove(entry)
                # Read anew: the rounds have gone through its images and left no trace in it.
                ready.append(UnitCaptions(entry.unit.caption, entry.unit.given, entry.unit.answers))

    def _send(self, entry: _Unit, beat: Callable[[], None]) -> bool:
        """Send a unit's open questions in as many files as they need; False where there are none."""
        left = 0
        lines: list[bytes] = []
        asked: list[tuple[str, Request]] = []
        size = 0
        for key, request in self._open_questions(entry):
            beat()
            if key in entry.given_up:
                left += 1
                continue
            line = self._api.line(key, request)
            if lines and (len(lines) == api.MAX_REQUESTS or size + len(line) > api.MAX_BYTES):
                self._send_file(entry, lines, asked)
                lines, asked, size = [], [], 0
            if self._stuck:
                break
            lines.append(line)
            asked.append((key, request))
            size += len(line)
        if lines and not self._stuck:
            self._send_file(entry, lines, asked)
        kept = sum(entry.unit.given.tables["select"]["kept"].to_pylist())
        if left > max(1, _LEFT * kept):
            raise LensError(
                f"{self._client.endpoint.url}: its batches left {left} of {kept} questions of unit {entry.unit.name} "
                f"without an answer in {_ROUNDS} rounds"
            )
        return bool(entry.running)

    def _open_questions(self, entry: _Unit) -> Iterator[tuple[str, Request]]:
        """(key, question) to the first model of each image that has one without an answer, with the image in it."""
        caption, endpoint, extra = self._caption, self._client.endpoint, self._client.endpoint.extra()
        unit = UnitCaptions(entry.unit.caption, entry.unit.given, entry.unit.answers)

        def open_jobs() -> Iterator[Job]:
            for job in unit.jobs():
                known = job.fresh()
                request = known.replay(unit.answers, sent.named(caption, job.sha256))
                if request is not None and not known.second:
                    yield job

        def question(job: Job) -> tuple[str, Request] | None:
            try:
                image = sent.prepare(caption, job.data, job.sha256, self._limits)
            except Undecodable:
                return None  # told when the unit's table is made
            request = job.fresh().replay(unit.answers, image)
            return request.key(endpoint.model, extra), request

        seen = set()
        for found in in_order(question, open_jobs(), lambda job: len(job.data)):
            if found is not None and found[0] not in seen:  # the same image twice
                seen.add(found[0])
                yield found

    def _send_file(self, entry: _Unit, lines: list[bytes], asked: list[tuple[str, Request]]) -> None:
        """Upload a file and begin its batch: each step stands in the journal before the next is taken."""
        usd, tokens = self._most(asked)
        if reason := self._over_budget(usd, tokens):
            self._held_back = any(entry.running for entry in self._units)
            self._spent_out = "" if self._held_back else reason
            return
        answers = entry.unit.answers
        one = _Sent(uuid.uuid4().hex, tuple(key for key, _ in asked), usd=usd, tokens=tokens)
        answers.write({"batch": one.name, "keys": one.keys, "since": one.since, "usd": usd, "tokens": tokens})
        one.file = self._api.upload(one.name, lines)
        answers.write({"batch": one.name, "file": one.file})
        for key in one.keys:
            answers.begin(key)
        answers.sync()
        one.batch = self._api.create(one.name, one.file).id
        answers.write({"batch": one.name, "id": one.batch})
        answers.sync()
        entry.running[one.name] = one

    def _most(self, asked: list[tuple[str, Request]]) -> tuple[float, int]:
        """US dollars and tokens that questions may take: if every answer is as long as it may be."""
        text = sum(len(part) for _, r in asked for m in r.messages for part in m.parts if isinstance(part, str))
        images = sum(not isinstance(part, str) for _, r in asked for m in r.messages for part in m.parts)
        largest = (sent.LONG_SIDE, self._caption.short_side)
        tokens_in = text / 3 + images * forecast.image_tokens(self._caption, *largest)
        tokens_out = len(asked) * self._caption.max_tokens
        return self._client.endpoint.usd(tokens_in, tokens_out), round(tokens_in + tokens_out)

    def _over_budget(self, usd: float, tokens: int) -> str:
        """Why a file that may take so much is not sent beside those that are running."""
        endpoint = self._client.endpoint
        running = [one for entry in self._units for one in entry.running.values()]
        spent_usd, spent_tokens = self._client.spent
        if endpoint.max_usd and spent_usd + usd + sum(one.usd for one in running) > endpoint.max_usd:
            return (
                f"{endpoint.url}: endpoint.max_usd is {endpoint.max_usd:g}, {spent_usd:.4f} are spent, and the next "
                f"file may take {usd:.4f}; raise it to go on: what was answered is kept"
            )
        if endpoint.max_tokens and spent_tokens + tokens + sum(one.tokens for one in running) > endpoint.max_tokens:
            return (
                f"{endpoint.url}: endpoint.max_tokens is {endpoint.max_tokens:,}, {spent_tokens:,} are spent, and the "
                f"next file may take {tokens:,}; raise it to go on: what was answered is kept"
            )
        return ""

    def _look(self, entry: _Unit, one: _Sent) -> None:
        """Whether a batch has ended; then its answers go into the journal, and its files away."""
        batch = self._api.look(one.batch)
        if not batch.ended:
            if time.time() - one.since > _LONGEST:
                raise LensError(
                    f"{self._client.endpoint.url}: batch {batch.id} is {batch.status} after {_LONGEST / 3600:.0f} "
                    "hours; the same command looks for it again"
                )
            return
        answers, left = entry.unit.answers, set(one.keys)
        stop = ""
        for key, outcome in self._api.results(batch):
            if key not in left:
                continue
            left.discard(key)
            if isinstance(outcome, Answer):
                if answers.get(key) is None:  # or a process that was killed here had put it down
                    answers.put(key, self._client.endpoint.model, self._client.paid(outcome))
                continue
            answers.fail(key)
            if outcome.act == "stop":
                # Said when the batch is put away: a run after the cause was mended must not meet it again.
                stop = stop or outcome.reason
            else:
                self._heed(entry, key, outcome)
        for key in left:  # expired, or left out
            answers.fail(key)
            if not batch.crowded:
                self._heed(entry, key, Failure("no answer", "again"))
        answers.write({"batch": one.name, "done": True})
        answers.sync()
        del entry.running[one.name]
        self._held_back = False
        self._api.remove(batch)
        if stop:
            raise LensError(f"{self._client.endpoint.url}: {stop}")
        if batch.crowded:
            self._crowded_until = time.monotonic() + 5 * self._caption.poll_seconds
            self._crowded_times += 1
            if self._crowded_times == _CROWDED:
                raise LensError(
                    f"{self._client.endpoint.url}: {_CROWDED} batches in turn were turned down for a limit of tokens "
                    f"({batch.message}); what else waits there? caption.batches is {self._caption.batches}"
                )
        elif batch.status == "failed":
            codes = ", ".join(filter(None, batch.codes))
            raise LensError(
                f"{self._client.endpoint.url}: batch {batch.id} failed: {batch.message or codes or 'no reason'}"
            )
        else:
            self._crowded_until, self._crowded_times = 0.0, 0

    def _heed(self, entry: _Unit, key: str, failure: Failure) -> None:
        """A question without an answer: sent again in the next round, or left to be asked online."""
        entry.tries[key] += 1
        if failure.act == "skip" or entry.tries[key] >= _ROUNDS:
            entry.given_up.add(key)

    def _resume(self, entry: _Unit) -> None:
        """Find the batches of an earlier process. A file without one is removed: its questions are sent anew."""
        noted: dict[str, _Sent] = {}
        for note in entry.unit.answers.notes:
            name = note.get("batch")
            if isinstance(note.get("keys"), list):
                numbers = [note.get(field, 0) for field in ("since", "usd", "tokens")]
                since, usd, tokens = (n if isinstance(n, int | float) else 0 for n in numbers)
                noted[name] = _Sent(name, tuple(map(str, note["keys"])), "", "", since, usd, int(tokens))
            elif name in noted:
                noted[name].file = str(note.get("file") or noted[name].file)
                noted[name].batch = str(note.get("id") or noted[name].batch)
                if note.get("done"):
                    del noted[name]
        for one in noted.values():
            if not one.batch and one.file:
                found = self._api.find(one.name)
                if found is None:
                    self._api.remove_file(one.file)
                    continue
                one.batch = found.id
                entry.unit.answers.write({"batch": one.name, "id": one.batch})
            if one.batch:
                entry.running[one.name] = one
