"""The run as a whole: what it writes, and that stopping and going on changes nothing."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from lens_jax import config as config_files
from lens_jax.errors import LensError
from lens_jax.models import denoiser
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.job import train
from lens_jax.pretraining.meter import Meter
from lens_jax.pretraining.recipe import abstract_state
from lens_jax.run import step, store
from lens_jax.run.log import read_metrics
from lens_jax.run.state import from_parts, to_parts
from lens_jax.run.store import Store


def with_out(config, out, **changes):
    return dataclasses.replace(config, out=str(out), **changes)


def all_arrays(state) -> dict[str, np.ndarray]:
    """Every number of a state, keys as raw bits."""
    raw = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(raw(leaf)) for path, leaf in leaves}


def assert_same_bits(actual, expected):
    actual, expected = all_arrays(actual), all_arrays(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.fixture(scope="module")
def uninterrupted(tiny_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    return train(with_out(tiny_config, out)).state, out


def test_run_writes_all_it_promises(uninterrupted, tiny_config):
    state, out = uninterrupted
    assert int(state.step) == tiny_config.steps
    train = read_metrics(out / "metrics.jsonl", "train")
    assert [record["step"] for record in train] == [2, 4, 6, 8]
    for record in train:
        assert {"loss", "loss_by_noise_level", "gradient_norm", "update_norm", "images_per_second",
                "tflops_per_second", "data_wait_share", "learning_rate"} <= record.keys()  # fmt: skip
    assert [record["step"] for record in read_metrics(out / "metrics.jsonl", "validation")] == [4, 8]
    assert Image.open(out / "samples" / "step_0000008.png").size[0] > 96
    assert list((out / "tensorboard").glob("events.out.tfevents.*"))
    saved = config_files.from_dict(TrainConfig, json.loads((out / "config.json").read_text()), "config.json")
    assert saved == with_out(tiny_config, out)
    steps = sorted(int(p.name) for p in (out / "checkpoints").iterdir())
    assert steps == [4, 8]


def test_validation_is_of_every_size_and_weighted_by_images(uninterrupted, tiny_config):
    """Three sizes share twelve images; two batches of four are of two of them at least, and their mean is by images."""
    for record in read_metrics(uninterrupted[1] / "metrics.jsonl", "validation"):
        assert len(record["loss_by_bucket"]) == 2
        losses = record["loss_by_bucket"].values()
        assert min(losses) <= record["loss"] <= max(losses)


def test_what_a_run_would_fail_at_is_found_before_its_first_step(tiny_config, tmp_path):
    """An event's settings too, and nothing is written."""
    samples, data = tiny_config.samples, tiny_config.data
    for changes, message in (
        ({"samples": dataclasses.replace(samples, sizes=("25x25",))}, "size 25x25 cannot be tiled"),
        ({"samples": dataclasses.replace(samples, prompts=("a\0b",))}, "prompt 0 holds bytes that are not text"),
        ({"data": dataclasses.replace(data, languages=("xx",))}, "data.languages xx"),
        ({"data": dataclasses.replace(data, batch_sizes=(4,) * 9)}, "so as many numbers"),
    ):
        with pytest.raises(LensError, match=message):
            train(with_out(tiny_config, tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()
    with pytest.raises(LensError, match=r"model\.param_dtype is 'bfloat16'; what is trained is kept in float32"):
        with_out(tiny_config, tmp_path, model=dataclasses.replace(tiny_config.model, param_dtype="bfloat16"))


def test_no_validation_split_is_found_before_the_first_step(tiny_config, tmp_path):
    from lens_jax.data.prepare_scenes import OpenMojiConfig, prepare_openmoji

    bare = OpenMojiConfig(out=str(tmp_path / "bare"), concepts=4, size=16, tile=4, scenes=4, validation=0, copies=1)
    data = dataclasses.replace(tiny_config.data, path=str(prepare_openmoji(bare, progress=False)))
    with pytest.raises(LensError, match=r"no records in the validation split; .* set validation\.every 0"):
        train(with_out(tiny_config, tmp_path / "run", data=data))
    assert not (tmp_path / "run").exists()


def test_learns(tiny_config, tmp_path):
    """Eighty steps on eight pictograms bring the loss well below that of predicting nothing (about 2)."""
    train(with_out(tiny_config, tmp_path / "run", steps=80))
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl", "train")]
    assert np.mean(losses[-5:]) < 0.75 * losses[0]


def test_stop_and_resume_is_bit_identical(uninterrupted, tiny_config, tmp_path, monkeypatch):
    """Stopped by a signal in the middle and started again: the same bits in parameters, average and optimiser."""
    stop_at = 3
    dispatch = Meter.dispatch

    def start_and_signal(meter, batch):
        dispatch(meter, batch)
        monkeypatch.seen += 1
        if monkeypatch.seen == stop_at * tiny_config.accumulation:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.seen = 0
    monkeypatch.setattr(Meter, "dispatch", start_and_signal)
    config = with_out(tiny_config, tmp_path / "run")
    outcome = train(config)
    assert outcome.stopped_by == signal.SIGTERM
    assert int(outcome.state.step) == stop_at
    resumed = train(config)
    assert resumed.stopped_by is None
    assert_same_bits(resumed.state, uninterrupted[0])
    # The record of the steps is the same too: none twice, none missing.
    for kind in ("train", "validation"):
        runs = (tmp_path / "run", uninterrupted[1])
        resumed_steps, whole_steps = ([r["step"] for r in read_metrics(run / "metrics.jsonl", kind)] for run in runs)
        assert resumed_steps == whole_steps


def test_told_twice_leaves_without_saving(uninterrupted, tiny_config, tmp_path, monkeypatch):
    """The user does not want to wait; nothing half-written is in the way of the next start."""
    dispatch = Meter.dispatch

    def start_and_signal(meter, batch):
        dispatch(meter, batch)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Meter, "dispatch", start_and_signal)
    config = with_out(tiny_config, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert newest_step(tmp_path / "run") == 0
    monkeypatch.undo()
    assert_same_bits(train(config).state, uninterrupted[0])


def test_a_clock_that_jumps_changes_nothing(uninterrupted, tiny_config, tmp_path, monkeypatch):
    """Months to and fro, at every look at it but while saving: the same bits and checkpoints, and rates as they are."""
    jumps, now, save = itertools.cycle((0, 1e7, -2e7, 86400)), time.time, Store.save
    steady = threading.Event()
    monkeypatch.setattr(time, "time", lambda: now() + (0 if steady.is_set() else next(jumps)))

    def save_all(self, *args):
        # Orbax gives a save twenty minutes by this clock: a jump then is a save that failed, which another test has.
        steady.set()
        save(self, *args)
        self.wait()
        steady.clear()

    monkeypatch.setattr(Store, "save", save_all)
    run = tmp_path / "run"
    assert_same_bits(train(with_out(tiny_config, run)).state, uninterrupted[0])
    assert sorted(int(p.name) for p in (run / "checkpoints").iterdir()) == [4, 8]
    records = read_metrics(run / "metrics.jsonl", "train")
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    assert all(record["images_per_second"] > 0 and 0 <= record["data_wait_share"] <= 1 for record in records)


@pytest.mark.parametrize("wanted", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_random_moments(uninterrupted, tiny_config, tmp_path, wanted):
    """SIGKILL, wherever it strikes, also while saving; the end is the same to the bit.

    Twenty times, and with two processes: `pytest -m slow tests/run/test_processes.py`.
    """
    run, steps = tmp_path / "run", 8 + 8 * wanted
    small = dataclasses.replace(tiny_config.checkpoint, every=1)
    quiet = dataclasses.replace(tiny_config.samples, every=0)
    unmeasured = dataclasses.replace(tiny_config.validation, every=0)
    config = with_out(tiny_config, run, steps=steps, checkpoint=small, samples=quiet, validation=unmeasured)
    command = command_for(config, tmp_path)
    rng = random.Random(0)
    kills = 0
    while kills < wanted:
        before = newest_step(run)
        process = subprocess.Popen(
            command, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        # Strike after a step was saved, so that each life gets somewhere, and then at any moment of the next ones.
        while newest_step(run) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        assert newest_step(run) < steps, "the run ended before it could be killed"
    final = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert final.returncode == 0, final.stderr

    undisturbed = dataclasses.replace(config, out=str(tmp_path / "whole"), checkpoint=tiny_config.checkpoint)
    expected = train(undisturbed).state
    abstract = abstract_state(config, None, offload=False)
    parts, meta = Store(store.folder_of(config.out, config.checkpoint), config.checkpoint).restore(to_parts(abstract))
    assert meta["position"]["batches"] == steps * config.accumulation
    assert_same_bits(from_parts(parts, abstract), expected)


def environment(folder: Path) -> dict[str, str]:
    """Of a child process; what one life has compiled, or this one before, the next need not compile again.

    In a copy: it may be killed, or find the disk full, while it writes what it compiled.
    """
    cache = folder / "cache"
    if not cache.exists():
        shutil.copytree(os.environ["JAX_COMPILATION_CACHE_DIR"], cache, ignore=shutil.ignore_patterns("*-atime"))
    known = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**os.environ, "JAX_PLATFORMS": "cpu", **known}


def command_for(config, folder: Path) -> list[str]:
    """The command line that trains `config` in a process of its own."""
    script = folder / "config.py"
    script.write_text(
        "import json\nfrom lens_jax import config as c\nfrom lens_jax.pretraining.config import TrainConfig\n"
        f"config = c.from_dict(TrainConfig, json.loads({json.dumps(config_files.to_dict(config))!r}), 'test')\n"
    )
    return [sys.executable, "-m", "lens_jax", "train", str(script)]


def newest_step(run: Path) -> int:
    folder = run / "checkpoints"
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=0)


@pytest.mark.slow
def test_offloaded_average_and_moments_change_nothing(uninterrupted, tiny_config, tmp_path):
    """Neither while training, validating, sampling and saving nor when a run goes on with it, or without it again."""
    offloaded = with_out(tiny_config, tmp_path / "run", offload=True)
    state = train(offloaded).state
    assert_same_bits(state, uninterrupted[0])
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert {x.sharding.memory_kind for x in (*jax.tree.leaves(state.ema), *moments)} == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {"device"}
    for before, after in ((uninterrupted[1], True), (tmp_path / "run", False)):
        rest = tmp_path / f"rest_{after}"
        shutil.copytree(before, rest)
        shutil.rmtree(rest / "checkpoints" / "8")
        assert_same_bits(train(with_out(tiny_config, rest, offload=after)).state, uninterrupted[0])


def test_finished_run_is_left_alone(uninterrupted, tiny_config):
    state, out = uninterrupted
    again = train(with_out(tiny_config, out))
    assert_same_bits(again.state, state)


def poison(monkeypatch, at_step: int) -> None:
    """One micro-step's gradients become NaN in the update that ends step `at_step`."""
    original = step.micro_step

    def poisoned(config, loss, state, totals, batch, micro):
        totals = original(config, loss, state, totals, batch, micro)
        bad = jax.numpy.where((state.step == at_step - 1) & (micro == 1), np.nan, 1.0)
        return jax.tree.map(lambda x: x * bad, totals)

    monkeypatch.setattr(step, "micro_step", poisoned)


def test_nonfinite_loss_stops_and_is_not_saved(tiny_config, tmp_path, monkeypatch):
    poison(monkeypatch, at_step=6)
    with pytest.raises(LensError, match=r"step 6: the loss \(nan\)"):
        train(with_out(tiny_config, tmp_path / "run"))
    assert newest_step(tmp_path / "run") == 4


def test_nonfinite_loss_is_skipped_when_asked(tiny_config, tmp_path, monkeypatch):
    poison(monkeypatch, at_step=6)
    state = train(with_out(tiny_config, tmp_path / "run", nonfinite="skip")).state
    assert int(state.step) == 8
    assert all(np.isfinite(x).all() for x in all_arrays(state).values() if x.dtype == np.float32)
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl", "skipped")] == [6]


def test_other_model_size_lists_the_differences(uninterrupted, tiny_config):
    model = dataclasses.replace(tiny_config.model, layers=3)
    with pytest.raises(LensError, match=r"another model.*blocks/image/down/kernel is \[2, .* has \[3, "):
        train(with_out(tiny_config, uninterrupted[1], model=model, steps=10))


def test_other_data_set_is_refused(uninterrupted, tiny_config, tmp_path):
    from lens_jax.data.prepare_scenes import OpenMojiConfig, prepare_openmoji

    other = prepare_openmoji(
        OpenMojiConfig(out=str(tmp_path / "other"), concepts=4, size=16, tile=4, scenes=20, validation=4, copies=1),
        progress=False,
    )
    data = dataclasses.replace(tiny_config.data, path=str(other))
    with pytest.raises(LensError, match="not the data set that"):
        train(with_out(tiny_config, uninterrupted[1], data=data, steps=10))


def test_full_disk_leaves_the_previous_checkpoint_whole(tiny_config, tmp_path):
    """The second checkpoint does not fit: one line, exit code 2, and the run goes on from the first."""
    config = with_out(tiny_config, tmp_path / "run", samples=dataclasses.replace(tiny_config.samples, every=0))
    train(dataclasses.replace(config, steps=4))
    # The kernel refuses to let files grow past 40 blocks, as a full disk does: arrays fail, the metrics still fit.
    limited = ["sh", "-c", 'ulimit -f 40; exec "$@"', "sh", *command_for(config, tmp_path)]
    failed = subprocess.run(limited, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    errors = [line for line in failed.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert "could not be saved" in errors[0]
    assert "earlier checkpoints are whole" in errors[0]
    assert "Traceback" not in failed.stderr
    assert store.find(tmp_path / "run").name == "4"
    assert int(train(config).state.step) == 8


def test_accumulation_equals_one_large_batch(tiny_config, pictograms):
    """Gradients of micro-batches add up to those of the whole, given the same noise."""
    from lens_jax.diffusion import losses
    from lens_jax.models import layers

    rng = np.random.default_rng(0)
    latents = rng.standard_normal((4, 16, 48), np.float32)
    text = rng.standard_normal((4, 2, 512), np.float32)
    noise, t = rng.standard_normal((4, 16, 48), np.float32), np.array([0.2, 0.5, 0.7, 0.9], np.float32)
    lengths, positions = np.array([2, 1, 0, 2], np.int32), layers.joint_positions(4, 4, 2)
    params = denoiser.init(tiny_config.model, jax.random.key(0))

    def gradient(rows):
        def loss(p):
            denoise = lambda x, t: denoiser.apply(tiny_config.model, p, x, (text[rows],), lengths[rows], t, positions)
            return losses.velocity_loss(denoise, latents[rows], t[rows], noise[rows]).mean()

        return jax.grad(loss)(params)

    whole = gradient(np.arange(4))
    parts = jax.tree.map(lambda a, b: (a + b) / 2, gradient(np.arange(2)), gradient(np.arange(2, 4)))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts)):
        np.testing.assert_allclose(a, b, atol=2e-6)
