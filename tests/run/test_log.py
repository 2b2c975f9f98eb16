"""The places that the numbers of a run are sent to, and the trace of some of its steps."""

import io
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lens_jax.errors import LensError
from lens_jax.run import log as log_module
from lens_jax.run.config import LoggingConfig, ProfileConfig
from lens_jax.run.log import Log, read_metrics
from lens_jax.run.profile import Profile


def test_profile_covers_its_steps_only(tmp_path):
    said = []
    profile = Profile(ProfileConfig(start=2, steps=2), tmp_path, said.append)
    for step in range(1, 6):
        profile.begin(step)
        jnp.ones(3).sum().block_until_ready()
        assert profile.ends(step) == (step == 3)
        profile.end(step)
    profile.close()
    assert len(said) == 1
    assert said[0].startswith(f"steps 2 to 3 traced in {tmp_path / 'profile'}")
    late = Profile(ProfileConfig(start=2, steps=2), tmp_path, said.append)
    late.begin(7)
    late.close()
    assert said[1] == "nothing traced: none of the steps 2 to 3 was taken here"


class FakeWandb(types.ModuleType):
    """Notes what it is told."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **options):
        if options["project"] == "forbidden":
            raise self.Error("no such project")
        self.calls.append(("init", options))
        note = lambda name: lambda *args, **kwargs: self.calls.append((name, args, kwargs))
        return types.SimpleNamespace(**{name: note(name) for name in ("define_metric", "log", "finish")})


def open_log(out, start: int = 0, console: Console | None = None, **changes) -> Log:
    log = Log(str(out), 10, LoggingConfig(**changes), ProfileConfig(), console or Console(file=io.StringIO()))
    log.open(start, {"config": {"model": {"layers": 2}}})
    return log


def test_wandb_gets_every_number_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    values = {"loss": np.float32(0.5), "loss_by_noise_level": [1.0, float("nan")], "loss_by_bucket": {"16x16": 0.25}}
    for start in (0, 4):
        log = open_log(tmp_path / "run", start, wandb="offline", wandb_project="pictograms")
        log.write(start + 2, "train", values)
        log.close()
    first, second = wandb.calls[:4], wandb.calls[4:]
    for calls, step in ((first, 2), (second, 6)):
        assert [call[0] for call in calls] == ["init", "define_metric", "log", "finish"]
        options = calls[0][1]
        assert (options["project"], options["mode"], options["resume"]) == ("pictograms", "offline", "allow")
        assert (options["name"], options["dir"]) == ("run", str(tmp_path / "run"))
        assert options["config"] == {"model": {"layers": 2}}
        assert calls[1][1:] == (("*",), {"step_metric": "step"})
        sent = {"train/loss": 0.5, "train/loss_by_noise_level/0": 1.0, "train/loss_by_bucket/16x16": 0.25}
        assert calls[2][1:] == (({"step": step, **sent},), {})
    assert first[0][1]["id"] == second[0][1]["id"] == (tmp_path / "run" / "wandb_id").read_text().strip()
    # Another run is another one there.
    open_log(tmp_path / "other", wandb="offline").close()
    assert wandb.calls[8][1]["id"] != first[0][1]["id"]


def test_wandb_that_fails_or_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    with pytest.raises(LensError, match=r"logging\.wandb: no such project; .* offline needs no network"):
        open_log(tmp_path / "run", wandb="offline", wandb_project="forbidden")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LensError, match=r'pip install "lens-jax\[wandb\]"'):
        open_log(tmp_path / "run", wandb="offline", wandb_project="forbidden")


def test_without_a_terminal_a_line_every_half_minute(tmp_path, monkeypatch):
    """Not for every record, not never, and for the last step always."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(log_module, "time", types.SimpleNamespace(monotonic=lambda: clock.now, time=lambda: 0.0))
    said = io.StringIO()
    log = open_log(tmp_path, console=Console(file=said, soft_wrap=True))
    for step in range(1, 11):
        clock.now += 12
        log.advance(step)
        log.write(step, "train", {"loss": 1.0 / step})
        log.note(f"loss {1 / step:.2f}")
    log.close()
    lines = [line for line in said.getvalue().splitlines() if line.startswith("step")]
    assert lines == [
        "step 3 of 10  loss 0.33  0:01:24 left",
        "step 6 of 10  loss 0.17  0:00:48 left",
        "step 9 of 10  loss 0.11  0:00:12 left",
        "step 10 of 10  loss 0.10  0:00:00 left",
    ]
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl", "train")] == list(range(1, 11))
    assert json.loads((tmp_path / "config.json").read_text()) == {"model": {"layers": 2}}
