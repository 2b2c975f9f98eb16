"""What a run measures, against numbers worked out by hand, and the places it is sent to."""

import dataclasses
import gzip
import io
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lens_jax import flops
from lens_jax.data.buckets import Bucket
from lens_jax.encoders.pixels import PixelCodecConfig
from lens_jax.errors import LensError
from lens_jax.models.denoiser import LENS
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.features import Features, Tokens
from lens_jax.run import log as metrics
from lens_jax.run import loop
from lens_jax.run.config import LoggingConfig, ProfileConfig
from lens_jax.run.log import read_metrics

# Operations of a forward pass of the released size, as in test_flops: (image tokens, text tokens).
FORWARD = {
    (1024, 150): 3_606_141_861_888,
    (4096, 0): 16_086_311_632_896,
    (4096, 150): 16_868_329_783_296,
    (4096, 256): 17_428_958_674_944,
}


def batch_of(side: int, lengths: list[int]) -> dict:
    return {"bucket": (side, side), "text_lengths": np.array(lengths, np.int32)}


def window_of(config: TrainConfig, text: int) -> metrics.Window:
    """For squares of 128 and 256 pixels, with room for so many text tokens."""
    return metrics.Window(config, {Bucket(s, s): Tokens((s // 4, s // 4), (s // 4) ** 2, text) for s in (128, 256)})


def numbers(loss: float, finite: bool = True) -> dict:
    """What a step returns, of which two samples fell into noise level 1."""
    norms = {"gradient_norm": 1.0, "update_norm": 2.0, "parameter_norm": 3.0, "learning_rate": 4.0}
    bins = {"noise_bin_loss": 2 * loss * np.eye(5)[1], "noise_bin_count": 2 * np.eye(5)[1]}
    return {"loss": loss, "losses": [loss], "finite": finite, **bins, **norms}


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test says so: `clock.now += 1`."""
    clock = types.SimpleNamespace(now=0.0)
    fake = types.SimpleNamespace(perf_counter=lambda: clock.now, time=lambda: 0.0)
    monkeypatch.setattr(metrics, "time", fake)
    monkeypatch.setattr(loop, "time", fake)
    return clock


@pytest.fixture
def lens():
    """The released size, where 4 x 4 pixels are a token; a tenth of the captions is dropped."""
    model = dataclasses.replace(LENS, remat="full")
    return dataclasses.replace(TrainConfig(), model=model, codec=PixelCodecConfig(patch=4))


def test_speed_is_that_of_the_exact_counts(lens, clock, monkeypatch):
    """One step of two images of 64 x 64 tokens with 150 and 256 of 256 text tokens, in ten seconds, by hand."""
    monkeypatch.setattr(flops, "peak", lambda kind: 100e12)
    window = window_of(lens, 256)
    window.start(batch_of(256, [150, 256]), 2.5)
    clock.now = 10.0
    window.finish(numbers(1.0))
    values = window.record(numbers(1.0))
    devices = jax.device_count()
    model = 3 * (0.9 * (FORWARD[4096, 150] + FORWARD[4096, 256]) + 0.1 * 2 * FORWARD[4096, 0])
    real, computed = 2 * 4096 + 0.9 * (150 + 256), 2 * (4096 + 256)
    outside = 4 * 128 * 1536 * 4096 + 2 * 4 * 2880 * 1536 * 256 + 2 * 256 * 1536 + 6 * 1536**2
    expected = {
        "images_per_second": 0.2,
        "tokens_per_second": real / 10,
        "tflops_per_second": model / 1e13,
        "tflops_per_second_per_device": model / 1e13 / devices,
        "mfu": model / 10 / devices / 100e12,
        # Forward, the blocks forward again, and backward at twice the cost, padding included.
        "hfu": 2 * (4 * FORWARD[4096, 256] - outside) / 10 / devices / 100e12,
        "padding_share": 1 - real / computed,
        "data_wait_share": 0.25,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert values["process_memory_gb"] > 0.01


def test_no_share_of_an_unknown_peak(lens, clock):
    window = window_of(lens, 150)
    window.start(batch_of(128, [150]), 0.0)
    clock.now = 1.0
    window.finish(numbers(1.0))
    values = window.record(numbers(1.0))
    assert values["tflops_per_second"] == pytest.approx(
        3 * (0.9 * FORWARD[1024, 150] + 0.1 * flops.denoiser_forward(LENS, 1024, 0)) / 1e12
    )
    assert not {"mfu", "hfu"} & values.keys()


def test_losses_stand_under_the_size_and_step_they_are_of(lens, clock):
    """A step's numbers arrive when the next one, of another size, has been dispatched; a skipped one does not count."""
    window = window_of(lens, 1)
    steps = [(256, 1.0, True), (128, 2.0, True), (256, 3.0, True), (256, float("nan"), False), (128, 9.0, True)]
    for i, (side, _, _) in enumerate(steps):
        window.start(batch_of(side, [1, 1]), 0.0)
        clock.now += 1
        if i:
            window.finish(numbers(*steps[i - 1][1:]))
    values = window.record(numbers(1.0))
    assert values["loss"] == 2.0
    assert values["loss_by_bucket"] == {"128x128": 2.0, "256x256": 2.0}
    np.testing.assert_array_equal(values["loss_by_noise_level"], [np.nan, 2, np.nan, np.nan, np.nan])
    assert values["images_per_second"] == 8 / 5
    # The last one belongs to the next record.
    clock.now += 1
    window.finish(numbers(9.0))
    assert window.record(numbers(1.0))["loss_by_bucket"] == {"128x128": 9.0}


def test_losses_of_an_update_of_two_sizes_stand_apart(lens, clock):
    window = window_of(dataclasses.replace(lens, accumulation=2), 1)
    for _ in range(2):
        window.start(batch_of(256, [1, 1]), 0.0)
        window.start(batch_of(128, [1, 1]), 0.0)
        clock.now += 1
        window.finish({**numbers(3.0), "losses": [2.0, 4.0]})
    values = window.record(numbers(1.0))
    assert values["loss"] == 3.0
    assert values["loss_by_bucket"] == {"128x128": 4.0, "256x256": 2.0}


def test_loop_with_a_slow_loader_says_so_and_is_profiled(tiny_config, tmp_path, clock, monkeypatch):
    """Waiting three seconds for a batch and one for the rest; the trace is written although the run ends inside it."""
    real_batches, real_encode = loop.batches, Features.encode

    class Slow:
        def __init__(self, *args, **kwargs):
            self.reader = real_batches(*args, **kwargs)

        def __iter__(self):
            return self

        def __next__(self):
            clock.now += 3
            return next(self.reader)

        def close(self):
            self.reader.close()

    def encode(*args, **kwargs):
        clock.now += 1
        return real_encode(*args, **kwargs)

    monkeypatch.setattr(loop, "batches", Slow)
    monkeypatch.setattr(Features, "encode", encode)
    said = Console(file=io.StringIO(), soft_wrap=True)
    quiet = dataclasses.replace(tiny_config.samples, every=0)
    profile, out = ProfileConfig(start=3, steps=100), tmp_path / "run"
    loop.train(dataclasses.replace(tiny_config, out=str(out), steps=6, samples=quiet, profile=profile), said)
    records = read_metrics(out / "metrics.jsonl", "train")
    assert [record["step"] for record in records] == [2, 4, 6]
    assert [record["data_wait_share"] for record in records] == [0.75, 0.75, 0.75]
    assert f"steps 3 to 6 traced in {out / 'profile'}" in said.file.getvalue()
    assert [path.stat().st_size > 0 for path in (out / "profile").rglob("*.xplane.pb")] == [True]
    (perfetto,) = (out / "profile").rglob("perfetto_trace.json.gz")
    names = {event.get("name") for event in json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]}
    assert "train" in names


def test_profile_covers_its_steps_only(tmp_path):
    said = []
    profile = metrics.Profile(ProfileConfig(start=2, steps=2), tmp_path, said.append)
    for step in range(1, 6):
        profile.begin(step)
        jnp.ones(3).sum().block_until_ready()
        assert profile.ends(step) == (step == 3)
        profile.end(step)
    profile.close()
    assert len(said) == 1
    assert said[0].startswith(f"steps 2 to 3 traced in {tmp_path / 'profile'}")
    late = metrics.Profile(ProfileConfig(start=2, steps=2), tmp_path, said.append)
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


def with_wandb(config, out, **changes):
    out.mkdir(exist_ok=True)
    return dataclasses.replace(config, out=str(out), logging=LoggingConfig(wandb="offline", **changes))


def test_wandb_gets_every_number_and_a_resumed_run_goes_on(tiny_config, tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = with_wandb(tiny_config, tmp_path / "run", wandb_project="pictograms")
    values = {"loss": np.float32(0.5), "loss_by_noise_level": [1.0, float("nan")], "loss_by_bucket": {"16x16": 0.25}}
    for start in (0, 4):
        log = metrics.MetricsLog(config, start, Console(file=io.StringIO()))
        log.write(start + 2, "train", values)
        log.close()
    first, second = wandb.calls[:4], wandb.calls[4:]
    for calls, step in ((first, 2), (second, 6)):
        assert [call[0] for call in calls] == ["init", "define_metric", "log", "finish"]
        options = calls[0][1]
        assert (options["project"], options["mode"], options["resume"]) == ("pictograms", "offline", "allow")
        assert (options["name"], options["dir"]) == ("run", str(tmp_path / "run"))
        assert options["config"]["model"]["layers"] == tiny_config.model.layers
        assert calls[1][1:] == (("*",), {"step_metric": "step"})
        sent = {"train/loss": 0.5, "train/loss_by_noise_level/0": 1.0, "train/loss_by_bucket/16x16": 0.25}
        assert calls[2][1:] == (({"step": step, **sent},), {})
    assert first[0][1]["id"] == second[0][1]["id"] == (tmp_path / "run" / "wandb_id").read_text().strip()
    # Another run is another one there.
    metrics.MetricsLog(with_wandb(tiny_config, tmp_path / "other"), 0, Console(file=io.StringIO())).close()
    assert wandb.calls[8][1]["id"] != first[0][1]["id"]


def test_wandb_that_fails_or_is_not_there_is_one_line(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    config = with_wandb(tiny_config, tmp_path / "run", wandb_project="forbidden")
    with pytest.raises(LensError, match=r"logging\.wandb: no such project; .* offline needs no network"):
        metrics.MetricsLog(config, 0, Console(file=io.StringIO()))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LensError, match=r'pip install "lens-jax\[wandb\]"'):
        metrics.MetricsLog(config, 0, Console(file=io.StringIO()))
