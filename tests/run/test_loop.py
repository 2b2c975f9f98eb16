"""The loop by a job of thirty lines: all that an algorithm must supply, and what the loop makes of it."""

import dataclasses
import functools
import gzip
import io
import json
import os
import signal
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from rich.console import Console

from lens_jax.errors import LensError
from lens_jax.run import lock, loop
from lens_jax.run import step as steps
from lens_jax.run.config import CheckpointConfig, LoggingConfig, ProfileConfig
from lens_jax.run.job import Event
from lens_jax.run.log import Log, read_metrics
from lens_jax.run.signals import StopSignals
from lens_jax.run.state import State, from_parts, to_parts
from lens_jax.run.store import Store


@dataclasses.dataclass(frozen=True)
class Config:
    out: str
    steps: int = 8
    nonfinite: str = "stop"
    checkpoint: CheckpointConfig = CheckpointConfig(every=4)
    logging: LoggingConfig = LoggingConfig(every=2)
    profile: ProfileConfig = ProfileConfig()


def distance(params, frozen, batch, key):
    """A loss: how far a point is from the targets, which it may not reach exactly for the noise."""
    error = params["point"]["x"] - frozen["goal"]["x"] - batch["shift"] - 0.1 * jax.random.normal(key, (3,))
    return jnp.mean(error**2), {"count": jnp.ones(())}


class Quadratic:
    """A job of `run`: moves a point to a goal."""

    kind, rules = "quadratic", {"point": {"x": (None,)}, "goal": {"x": (None,)}}

    def __init__(self, config: Config, events=()):
        self.config, self.events, self.meter = config, events, self
        self._optimizer = optax.with_extra_args_support(optax.sgd(0.1))
        settings = steps.StepConfig(ema_decay=None)
        self._programs = steps.make_programs(settings, distance, self._optimizer, lambda step: 0.1)

    def check(self):
        pass

    def create(self) -> State:
        point = {"point": {"x": jnp.zeros(3)}}
        goal, key = {"goal": {"x": jnp.arange(3.0)}}, jax.random.key(0)
        return State(jnp.int32(0), point, goal, None, self._optimizer.init(point), {}, key)

    def abstract(self) -> State:
        return jax.eval_shape(self.create)

    def parts(self, state):
        return to_parts(state)

    def resume(self, parts):
        return from_parts(parts, self.abstract())

    def meta(self):
        return {"config": {"steps": self.config.steps}}

    def batches(self, position):
        return Counting(position["taken"] if position else 0)

    def step(self, state, batches):
        return self._programs.train_step(state, next(batches))

    def add(self, metrics):
        pass

    def record(self, seconds):
        return {}

    def note(self, values):
        return f"loss {values['loss']:.3f}"


class Counting:
    """Batches that are known by their number."""

    def __init__(self, taken: int):
        self.position = {"taken": taken}

    def __next__(self):
        taken = self.position["taken"]
        self.position = {"taken": taken + 1}
        return {"shift": jnp.float32(0.01 * taken)}

    def close(self):
        pass


def go(config: Config, events=(), signals=None, console=None) -> loop.Outcome:
    console = console or Console(file=io.StringIO(), soft_wrap=True)
    log = Log(config.out, config.steps, config.logging, config.profile, console)
    store = Store(epath.Path(config.out) / "checkpoints", config.checkpoint)
    return loop.run(Quadratic(config, events), store, log, signals or StopSignals())


class Late:
    """Signals as several processes have them: what comes in a step is agreed on in the next."""

    def __init__(self, at: int):
        self.asked, self._at = 0, at

    def agreed(self):
        self.asked += 1
        return signal.SIGTERM if self.asked == self._at + 1 else None


def test_stopped_and_resumed_it_ends_with_the_same_bits(tmp_path):
    whole = go(Config(str(tmp_path / "whole"))).state
    stopped = go(Config(str(tmp_path / "run")), signals=Late(at=4))
    assert (stopped.stopped_by, int(stopped.state.step)) == (signal.SIGTERM, 5)
    resumed = go(Config(str(tmp_path / "run"))).state
    np.testing.assert_array_equal(resumed.params["point"]["x"], whole.params["point"]["x"])
    losses = [read_metrics(tmp_path / name / "metrics.jsonl", "train") for name in ("whole", "run")]
    assert [[record["step"] for record in records] for records in losses] == [[2, 4, 6, 8]] * 2


@pytest.mark.parametrize("writes", [True, False])
def test_a_signal_as_the_profile_ends_is_not_lost(tmp_path, monkeypatch, writes):
    """On the process that traces and on the others alike: they stop after the same step."""
    init = loop.Log.__init__

    def with_role(self, *args):
        init(self, *args)
        self.profile._writes = writes

    monkeypatch.setattr(loop.Log, "__init__", with_role)
    config = Config(str(tmp_path / "run"), profile=ProfileConfig(start=2, steps=2))
    signals = Late(at=3)
    stopped = go(config, signals=signals)
    assert (stopped.stopped_by, int(stopped.state.step), signals.asked) == (signal.SIGTERM, 4, 4)


def test_events_are_due_by_their_own_number_and_at_the_end(tmp_path):
    seen = []
    events = (Event(3, lambda state, step, log: seen.append((step, int(state.step)))), Event(0, seen.append))
    go(Config(str(tmp_path / "run")), events)
    assert seen == [(3, 3), (6, 6), (8, 8)]


def test_a_refused_start_changes_nothing(tmp_path, monkeypatch):
    """Neither what an earlier start wrote, nor does it leave a folder where there was none."""

    def refuse(self, *args):
        raise LensError("not this one")

    config = Config(str(tmp_path / "run"))
    go(config)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for name in ("check", "batches", "resume"):
        with monkeypatch.context() as patch:
            patch.setattr(Quadratic, name, refuse)
            with pytest.raises(LensError, match="not this one"):
                go(dataclasses.replace(config, steps=20))
    monkeypatch.setattr(Quadratic, "kind", "cubic")
    with pytest.raises(LensError, match="checkpoints of 'quadratic', this run is of 'cubic'"):
        go(dataclasses.replace(config, steps=20))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    monkeypatch.setattr(Quadratic, "create", refuse)
    with pytest.raises(LensError, match="not this one"):
        go(Config(str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_skipped_steps_do_not_delay_the_schedule():
    """The rate of step n is that of n, whatever was left out before."""
    seen = []

    def update(updates, state, params=None, *, step, **extra):
        return jax.tree.map(lambda u: -(step + 1.0) * jnp.sign(u), updates), state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    config = steps.StepConfig(ema_decay=None, skip_nonfinite=True)
    loss = lambda params, frozen, batch, key: (jnp.sum(params["point"]["x"] * batch["slope"]), {})
    take = functools.partial(steps.train_step, config, loss, optimizer, lambda step: step + 1.0)
    state = State(jnp.int32(0), {"point": {"x": jnp.zeros(1)}}, {}, None, optax.EmptyState(), {}, jax.random.key(0))
    for slope in (1.0, jnp.nan, 1.0):
        state, metrics = take(state, {"slope": slope})
        seen.append((float(state.params["point"]["x"][0]), float(metrics["learning_rate"]), bool(metrics["finite"])))
    assert seen == [(-1, 1, True), (-1, 2, False), (-4, 3, True)]


def test_sums_of_micro_steps_live_in_one_buffer():
    """An update gives the emptied sums back in the memory of those it has read."""
    optimizer = optax.with_extra_args_support(optax.sgd(0.1))
    programs = steps.make_programs(steps.StepConfig(None, accumulation=2), distance, optimizer, lambda step: 0.1)
    params, goal = {"point": {"x": jnp.zeros(3)}}, {"goal": {"x": jnp.arange(3.0)}}
    state = State(jnp.int32(0), params, goal, None, optimizer.init(params), {}, jax.random.key(0))
    batch = {"shift": jnp.float32(0)}
    totals = programs.empty_totals(state, batch)
    where = totals.gradients["point"]["x"].unsafe_buffer_pointer()
    for _ in range(3):
        for micro in range(2):
            totals = programs.micro_step(state, totals, batch, micro)
        state, totals, metrics = programs.update(state, totals)
        assert totals.gradients["point"]["x"].unsafe_buffer_pointer() == where
        assert not np.any(totals.gradients["point"]["x"])
        assert float(metrics["count"]) == 2


def test_a_slow_loader_is_told_and_the_trace_is_written_at_the_end(tmp_path, monkeypatch):
    """Waiting three seconds for a batch and one for the rest; the run ends inside the trace."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    take, dispatch = Counting.__next__, Quadratic.step

    def slow(self):
        clock.now += 3
        return take(self)

    def busy(self, state, batches):
        clock.now += 1
        return dispatch(self, state, batches)

    monkeypatch.setattr(Counting, "__next__", slow)
    monkeypatch.setattr(Quadratic, "step", busy)
    said = Console(file=io.StringIO(), soft_wrap=True)
    out = tmp_path / "run [1]"
    go(Config(str(out), steps=6, profile=ProfileConfig(start=3, steps=100)), console=said)
    records = read_metrics(out / "metrics.jsonl", "train")
    assert [record["data_wait_share"] for record in records] == [0.75, 0.75, 0.75]
    assert all(record["process_memory_gb"] > 0.01 for record in records)
    assert f"steps 3 to 6 traced in {out / 'profile'}" in said.file.getvalue()
    assert [path.stat().st_size > 0 for path in Path(out / "profile").rglob("*.xplane.pb")] == [True]
    (perfetto,) = Path(out / "profile").rglob("perfetto_trace.json.gz")
    names = {event.get("name") for event in json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]}
    assert "train" in names


def test_of_two_runs_in_a_folder_the_second_is_refused(tmp_path):
    """Also of one in the checkpoints of another; what a crash leaves behind holds nothing."""
    config = Config(str(tmp_path / "run"))
    seen = []

    def second(state, step, log):
        for other in (config, Config(str(tmp_path / "other"), checkpoint=CheckpointConfig(path=config.out))):
            message = rf"run: another trainer is at work in it \(process {os.getpid()} on "
            folders = other.out, other.checkpoint.path or other.out
            with pytest.raises(LensError, match=message), lock.held(*folders):
                pass
        seen.append(step)

    go(config, (Event(8, second),))
    assert seen == [8]
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "run" / lock.NAME).exists()
    (tmp_path / "run" / lock.NAME).write_text("left by a crash")
    go(dataclasses.replace(config, steps=9))


def test_a_checkpoint_folder_that_is_not_there_is_no_new_run(tmp_path):
    """The metrics are left as they are; before the first checkpoint a run begins anew."""
    run = tmp_path / "run"
    go(Config(str(run)))
    before = (run / "metrics.jsonl").read_bytes()
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(LensError, match=r"run/checkpoints: holds no checkpoint, but .*run has saved .* after step 8;"):
        go(Config(str(run)))
    assert (run / "metrics.jsonl").read_bytes() == before
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "metrics.jsonl", "saved.json"]
    (run / "saved.json").unlink()
    assert int(go(Config(str(run))).state.step) == 8
    assert (run / "metrics-1.jsonl").read_bytes() == before


def test_changed_settings_are_said(tmp_path):
    said = Console(file=io.StringIO(), soft_wrap=True)
    go(Config(str(tmp_path / "run")))
    go(Config(str(tmp_path / "run"), steps=9), console=said)
    assert "changed since that was saved: steps 8 -> 9\n" in said.file.getvalue()
    again = Console(file=io.StringIO(), soft_wrap=True)
    go(Config(str(tmp_path / "run"), steps=10), signals=Late(at=0), console=again)
    assert "changed since" in again.file.getvalue()


def test_a_damaged_log_does_not_stop_a_run(tmp_path):
    go(Config(str(tmp_path / "run")))
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'\xff\xfe\x80 junk\n{"step": "x", "kind": 1}\n[]\n{"step')
    go(Config(str(tmp_path / "run"), steps=10))
    assert [record["step"] for record in read_metrics(path, "train")] == [2, 4, 6, 8, 10]
