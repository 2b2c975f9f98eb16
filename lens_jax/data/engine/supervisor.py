"""The workers of one machine, watched: who dies is replaced, who hangs is ended, and what they did is counted.

Exactly-once does not rest on this: a result is a file whose name says what it is of, so any of it may die at any time.
"""

import contextlib
import json
import os
import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import connection
from typing import Any

from lens_jax.atomic import write_json
from lens_jax.data.engine import attempts, processes, worker
from lens_jax.data.engine.config import EngineConfig
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.losses import check_losses
from lens_jax.data.engine.run_unit import Done, Runner
from lens_jax.data.engine.stage import Stage, StopRun
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError

# A unit that takes so many times the median is shown as slow, and ended where it also shows no sign of life.
SLOW = 20
# Loading models may take long. Where workers die of it, more of them will too.
OPEN_SECONDS = 1800.0
_OPEN_FAILURES = 3
# Where none succeeds, so many failed units are taken for all of them.
_ALL_FAIL = 3
# A worker that gets little of a processor is slow for no fault of its own: it has so many times as long.
_STARVED = 10
# Seconds between signs of life on disk.
_STATUS_EVERY = 2.0


@dataclass(frozen=True)
class Options:
    """How a stage is run here; none of it changes a result."""

    # Processes; 0 runs in this one.
    workers: int = 1
    # Go on where more than half of a source's images are lost.
    accept_losses: bool = False
    # Stop at the first image that is not as it should be.
    strict: bool = False
    # Of several machines, which this is, of how many.
    host: int = 0
    hosts: int = 1


@dataclass
class Progress:
    """What is known of a stage while it runs."""

    stage: str
    units: int
    done: int = 0
    # Images by source and reason: of the units that were found and of those run now.
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    # Images of units run now, and since when.
    images: int = 0
    started: float = field(default_factory=time.monotonic)
    # Units that ended their worker or were ended, and units that have failed for good.
    restarts: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    # Units at work: (unit, images so far, seconds, slow).
    working: list[tuple[str, int, float, bool]] = field(default_factory=list)
    # Largest resident memory of a worker after a unit, in bytes.
    memory: int = 0
    cpu_seconds: float = 0.0

    def add(self, done: Done) -> None:
        self.done += 1
        self.counts[done.source].update(done.counts)
        if not done.found:
            self.images += sum(done.counts.values())
            self.cpu_seconds += done.cpu_seconds
            self.memory = max(self.memory, done.memory)


@dataclass
class _Worker:
    process: Any
    pipe: connection.Connection
    shared: Any
    since: float
    ready: bool = False
    unit: Unit | None = None
    # The last sign of life that was seen, and the processor time that the worker had used by then.
    beat: float = 0.0
    cpu: float = 0.0


class Supervisor:
    """Runs a stage on units, in `options.workers` processes."""

    def __init__(
        self,
        stage: Stage,
        config: EngineConfig,
        layout: Layout,
        options: Options,
        progress: Progress,
        show: Callable[[Progress], None],
    ):
        self._stage, self._config, self._layout, self._options = stage, config, layout, options
        self._progress, self._show = progress, show
        self._queue: deque[Unit] = deque()
        self._workers: list[_Worker] = []
        self._open_failures = 0
        self._times: list[float] = []
        name = f"{os.uname().nodename}-{os.getpid()}"
        self._log = layout.logs(stage.name) / f"{name}.jsonl"
        self._running = layout.running / f"{name}.json"
        self._printed = layout.work / "printed" / f"{stage.name}-{name}.txt"
        self._written = 0.0

    def run(self, units: Sequence[Unit]) -> None:
        """Run every unit; LensError where workers cannot be had or too much is lost."""
        self._queue.extend(units)
        try:
            if self._options.workers == 0:
                self._run_here()
            elif units:
                self._run_workers()
        finally:
            self._stop()
            with contextlib.suppress(OSError):
                self._running.unlink(missing_ok=True)

    def _run_here(self) -> None:
        if not self._queue:
            return
        runner = Runner(self._stage, self._config, self._layout)
        while self._queue:
            unit = self._queue.popleft()
            self._progress.working = [(unit.id, 0, 0.0, False)]
            self._tick(True)
            try:
                done = runner(unit)
            except StopRun:
                raise
            except LensError as error:
                self._give_up(unit, str(error))
            except Exception as error:
                # The same three attempts as with workers; the last tries the images one by one.
                self._progress.restarts += 1
                self._queue.append(unit)
                self._note_error(unit, f"{type(error).__name__}: {error}")
            else:
                self._take(done)

    def _run_workers(self) -> None:
        count = min(self._options.workers, len(self._queue))
        while self._queue or any(w.unit for w in self._workers):
            while len(self._workers) < min(count, len(self._queue) + sum(w.unit is not None for w in self._workers)):
                self._workers.append(self._start())
            by_pipe = {w.pipe: w for w in self._workers}
            for pipe in connection.wait(list(by_pipe), timeout=0.25):
                self._hear(by_pipe[pipe])
            for each in list(self._workers):
                self._watch(each)
                if each.ready and each.unit is None and self._queue:
                    self._send(each, self._queue.popleft())
            self._tick()

    def _start(self) -> _Worker:
        context = processes.context()
        ours, theirs = context.Pipe()
        shared = context.RawArray("d", 2)
        process = context.Process(
            target=worker.main,
            args=(theirs, shared, self._stage, self._config, self._layout, self._printed),
            # No daemon: a daemon may have no children, and careful mode has.
        )
        process.start()
        theirs.close()
        return _Worker(process, ours, shared, time.monotonic())

    def _send(self, each: _Worker, unit: Unit) -> None:
        each.unit, each.since = unit, time.monotonic()
        each.shared[worker.BEAT], each.shared[worker.ITEMS] = time.time(), 0
        with contextlib.suppress(BrokenPipeError, ConnectionError):  # it has died: its pipe says so next
            each.pipe.send(unit)

    def _hear(self, each: _Worker) -> None:
        try:
            message = each.pipe.recv()
        except (EOFError, ConnectionError, OSError):
            self._bury(each)
            return
        unit, each.unit = each.unit, None
        match message:
            case worker.Ready():
                each.ready, each.unit, self._open_failures = True, unit, 0
            case worker.Broken():
                raise LensError(message.message)
            case Done():
                self._times.append(message.seconds)
                self._take(message)
            case worker.Failed():
                self._give_up(unit, message.message)
            case worker.Raised():
                self._progress.restarts += 1
                self._note_error(unit, message.message)
                self._queue.append(unit)

    def _bury(self, each: _Worker, why: str = "") -> None:
        """A worker that has died or was ended: its unit is tried again, after the others."""
        each.process.join(10)
        code = each.process.exitcode
        why = why or (f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}")
        self._workers.remove(each)
        each.pipe.close()
        if each.unit is not None:
            self._progress.restarts += 1
            self._note_error(each.unit, f"its worker ended: {why}")
            self._queue.append(each.unit)
        elif not each.ready:
            self._open_failures += 1
            if self._open_failures == _OPEN_FAILURES:
                raise LensError(
                    f"stage {self._stage.name}: its workers end before they are ready ({why}); what they printed is in "
                    f"{self._printed}"
                )

    def _watch(self, each: _Worker) -> None:
        """End a worker without a sign of life."""
        if each.unit is not None:
            silent = time.time() - each.shared[worker.BEAT]
            if each.shared[worker.BEAT] != each.beat:
                each.beat, each.cpu = each.shared[worker.BEAT], _cpu_seconds(each.process.pid)
            median = statistics.median(self._times) if len(self._times) >= 5 else 0.0
            limit = max(self._config.stall_seconds, SLOW * median if not each.shared[worker.ITEMS] else 0.0)
            if silent > limit and _is_starved(_cpu_seconds(each.process.pid) - each.cpu, silent):
                limit *= _STARVED
            why = f"no sign of life for {silent:.0f} seconds"
        else:
            silent, limit = time.monotonic() - each.since, OPEN_SECONDS
            why = f"not ready after {limit:.0f} seconds"
            if each.ready:
                return
        if silent > limit:
            each.process.kill()
            self._bury(each, why)

    def _take(self, done: Done) -> None:
        self._progress.add(done)
        line = {k: v for k, v in asdict(done).items() if k != "found"} | {"time": time.time()}
        # One write of one line: a death leaves at most half of the last, which readers leave out.
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        check_losses(self._stage.name, done.source, self._progress.counts[done.source], self._options, at_end=False)

    def _give_up(self, unit: Unit, message: str) -> None:
        self._progress.failed[unit.id] = message
        path = self._layout.failed(self._stage.name, unit.id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(message + "\n", encoding="utf-8", errors="backslashreplace")
        if self._options.strict or (self._progress.images == 0 and len(self._progress.failed) == _ALL_FAIL):
            raise LensError(message)

    def _note_error(self, unit: Unit, message: str) -> None:
        """Said beside the attempt that it ended, where `data status` finds it."""
        notes = self._layout.attempts(self._stage.name, unit.id)
        with contextlib.suppress(OSError), open(notes / f"{attempts.count(notes):03d}", "a", encoding="utf-8") as file:
            file.write(message + "\n")

    def _tick(self, force: bool = False) -> None:
        now = time.monotonic()
        median = statistics.median(self._times) if len(self._times) >= 5 else None
        if self._workers:
            self._progress.working = [
                (w.unit.id, int(w.shared[worker.ITEMS]), now - w.since, bool(median and now - w.since > SLOW * median))
                for w in self._workers
                if w.unit is not None
            ]
        self._show(self._progress)
        if force or now - self._written > _STATUS_EVERY:
            self._written = now
            self._running.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._running, self._sign_of_life())

    def _sign_of_life(self) -> dict[str, Any]:
        p = self._progress
        return {
            "stage": p.stage,
            "host": self._options.host,
            "hosts": self._options.hosts,
            "machine": os.uname().nodename,
            "process": os.getpid(),
            "time": time.time(),
            "units": p.units,
            "done": p.done,
            "images_per_second": p.images / max(time.monotonic() - p.started, 1e-9),
            "restarts": p.restarts,
            "failed": len(p.failed),
            "memory": p.memory,
            "counts": {source: dict(counts) for source, counts in p.counts.items()},
            "working": [list(entry) for entry in p.working],
        }

    def _stop(self) -> None:
        """End the workers: those without a unit by a word, the others by SIGTERM, which undoes their notes."""
        for each in self._workers:
            if each.unit is None:
                with contextlib.suppress(OSError):
                    each.pipe.send(None)
            else:
                each.process.terminate()
        end = time.monotonic() + 10
        for each in self._workers:
            each.process.join(max(end - time.monotonic(), 0.1))
            if each.process.is_alive():
                each.process.kill()
                each.process.join()
            each.pipe.close()
        self._workers.clear()


def _cpu_seconds(process: int) -> float:
    """Processor time that a process has used; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{process}/stat") as file:
        # Behind the name, which may have spaces and brackets in it.
        fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _is_starved(cpu: float, silent: float) -> bool:
    """Whether a process that used so much of a processor in that time neither waits for something nor loops: then it
    would have used none, or all of it."""
    return 0.2 < cpu < silent / 4
