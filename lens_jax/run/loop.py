"""The one training loop: it takes the steps of a job, and saves, records and shows what comes of them."""

import contextlib
import dataclasses
import math
import signal
import time
from typing import Any

import jax
import numpy as np

from lens_jax.errors import LensError
from lens_jax.run.job import Batches, Event, Job
from lens_jax.run.log import Log
from lens_jax.run.memory import memory
from lens_jax.run.signals import StopSignals
from lens_jax.run.state import State
from lens_jax.run.store import Store


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: State
    # The signal that stopped it early, or None when all steps were taken.
    stopped_by: signal.Signals | None


def run(job: Job, store: Store, log: Log, signals: StopSignals) -> Outcome:
    """Take the steps of a job from where its newest checkpoint stands, or from the start.

    A run killed at any moment and started again takes the steps that one without interruption would have taken: the
    batches follow from a position that is saved, the randomness of step n depends on n, and a checkpoint has the rest.
    """
    config, last = job.config, job.config.steps
    job.check()
    state, position = _begin(job, store, log)
    start = int(state.step)
    if start >= last:
        log.say(f"{config.out} is complete: {start} steps")
        return Outcome(state, None)
    batches = _Timed(job.batches(position))
    log.open(start, job.meta())
    saves = Event(config.checkpoint.every, lambda state, step, _: _save(job, store, state, step, batches))
    window, pending, stop = _Window(), None, None
    try:
        for step in range(start + 1, last + 1):
            log.profile.begin(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = job.step(state, batches)
            # Before anything that one process may do and another not, or some would act on it and some would not.
            stop = signals.agreed()
            # The devices work on this step while the host reads the numbers of the one before.
            if pending is not None:
                _report(job, log, window, batches, *pending)
            pending = step, metrics
            # What is due after it. The last step does all, a stop only saves.
            events = [saves] if stop else [event for event in (saves, *job.events) if event.due(step, last)]
            if not (events or log.profile.ends(step)):
                continue
            # This needs the step's state, and a state must be known to be finite before it is saved.
            _report(job, log, window, batches, *pending)
            pending = None
            log.profile.end(step)
            for event in events:
                event.act(state, step, log)
            window.restart_clock()
            if stop:
                break
        store.close()
    except (jax.errors.JaxRuntimeError, KeyboardInterrupt):
        # Another process is gone, and with it what would complete a save; or the user will not wait.
        store.abandon()
        raise
    finally:
        batches.close()
        log.close()
        # What was being saved when something failed may still succeed; its own failure must not hide the first one.
        with contextlib.suppress(LensError):
            store.close()
    taken = int(state.step)
    if stop and taken < last:
        log.say(f"stopped by {stop.name} after step {taken}, saved; the same command goes on from there")
        return Outcome(state, stop)
    log.say(f"done: {taken} steps, checkpoint and metrics in {config.out}")
    return Outcome(state, None)


def _begin(job: Job, store: Store, log: Log) -> tuple[State, dict[str, Any] | None]:
    """The state to start from and the position in the data that belongs to it, None for the start."""
    found = store.restore(job.parts(job.abstract()), log.say)
    if found is None:
        return job.create(), None
    parts, meta = found
    if meta.get("kind") != job.kind:
        raise LensError(f"{store.folder}: checkpoints of {meta.get('kind')!r}, this run is of {job.kind!r}")
    state = job.resume(parts)
    log.say(f"resuming {job.config.out} after step {int(state.step)}")
    return state, meta["position"]


def _save(job: Job, store: Store, state: State, step: int, batches: "_Timed") -> None:
    store.save(step, job.parts(state), {"kind": job.kind, "position": batches.position, **job.meta()})


def _report(job: Job, log: Log, window: "_Window", batches: "_Timed", step: int, metrics: dict[str, Any]) -> None:
    """Wait for a step's numbers, stop if they are not finite, and write a record when one is due."""
    metrics = jax.device_get(metrics)
    window.add(metrics)
    job.meter.add(metrics)
    log.advance(step)
    if not metrics["finite"]:
        loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
        if job.config.nonfinite == "stop":
            raise LensError(
                f"step {step}: the loss ({loss:.4g}) or the gradient norm ({norm:.4g}) is not finite; nothing of this "
                "step was saved. Lower optimizer.learning_rate, or set --nonfinite skip to leave such steps out"
            )
        log.write(step, "skipped", {"loss": loss, "gradient_norm": norm})
        log.say(f"step {step}: loss or gradient not finite, step skipped")
    if step % job.config.logging.every == 0 or step == job.config.steps:
        seconds, values = window.take()
        measured = {"data_wait_share": batches.take_waited() / seconds, **memory()}
        values = {**values, **job.meter.record(seconds), **measured}
        log.write(step, "train", values)
        log.note(job.meter.note(values))


class _Timed:
    """A job's batches, and how long the loop has waited for them."""

    def __init__(self, batches: Batches):
        self._batches, self._waited = batches, 0.0
        self.close = batches.close

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        start = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - start
        return batch

    @property
    def position(self) -> dict[str, Any]:
        return self._batches.position

    def take_waited(self) -> float:
        """Seconds since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited


class _Window:
    """Sums over the steps since the last record."""

    def __init__(self):
        self._seconds, self._losses, self._scalars = 0.0, [], {}
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out what happened since the last step: saving, validating, sampling."""
        self._last = time.perf_counter()

    def add(self, metrics: dict[str, Any]) -> None:
        """The numbers of a step that has just ended. The loss of one that is skipped is left out."""
        now = time.perf_counter()
        self._seconds, self._last = self._seconds + now - self._last, now
        self._scalars = {name: float(x) for name, x in metrics.items() if np.ndim(x) == 0 and name != "finite"}
        if metrics["finite"]:
            self._losses.append(self._scalars["loss"])

    def take(self) -> tuple[float, dict[str, float]]:
        """Seconds, and the newest scalars with the mean loss; then the window starts anew."""
        seconds, loss = self._seconds, float(np.mean(self._losses)) if self._losses else math.nan
        self._seconds, self._losses = 0.0, []
        return seconds, {**self._scalars, "loss": loss}
