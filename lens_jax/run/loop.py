"""The one training loop: it takes the steps of a job, and saves, records and shows what comes of them."""

import contextlib
import dataclasses
import json
import math
import signal
import time
from typing import Any

import jax
import numpy as np

from lens_jax.errors import LensError
from lens_jax.run import lock
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
    Of two runs in a folder the second is refused.
    """
    with lock.held(job.config.out, store.folder):
        job.check()
        return _run(job, store, log, signals)


def _run(job: Job, store: Store, log: Log, signals: StopSignals) -> Outcome:
    config, last = job.config, job.config.steps
    state, position = _begin(job, store, log)
    start = int(state.step)
    if start >= last:
        log.say(f"{config.out} is complete: {start} steps")
        return Outcome(state, None)
    batches = _Timed(job.batches(position))
    log.open(start, job.meta())
    saves = Event(config.checkpoint.every, lambda state, step, log: _save(job, store, log, state, step, batches))
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
        _report_saved(store, log)
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
        if saved := log.saved():
            raise LensError(
                f"{store.folder}: holds no checkpoint, but {job.config.out} has saved some, the newest after step "
                f"{saved}; mount what is missing or set checkpoint.path, or choose another folder for a new run"
            )
        return job.create(), None
    parts, meta = found
    if meta.get("kind") != job.kind:
        raise LensError(f"{store.folder}: checkpoints of {meta.get('kind')!r}, this run is of {job.kind!r}")
    state = job.resume(parts)
    log.say(f"resuming {job.config.out} after step {int(state.step)}")
    changed = _changes(meta.get("config"), job.meta()["config"])
    if changed:
        log.say(f"changed since that was saved: {', '.join(changed)}")
    return state, meta["position"]


def _changes(before: Any, now: Any, name: str = "") -> list[str]:
    """`name before -> now` of every field of a config, as plain JSON, that is another than it was."""
    if isinstance(before, dict) and isinstance(now, dict):
        # A field that only one version of the code has is no setting that was changed.
        common = [key for key in now if key in before]
        return [line for key in common for line in _changes(before[key], now[key], f"{name}.{key}" if name else key)]
    same = json.dumps(before, sort_keys=True) == json.dumps(now, sort_keys=True)
    return [] if same else [f"{name} {before} -> {now}"]


def _save(job: Job, store: Store, log: Log, state: State, step: int, batches: "_Timed") -> None:
    store.save(step, job.parts(state), {"kind": job.kind, "position": batches.position, **job.meta()})
    _report_saved(store, log)


def _report_saved(store: Store, log: Log) -> None:
    """The save that was last found whole; the newest one may still be written."""
    if store.acknowledged is not None:
        log.write_saved(store.acknowledged)


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
