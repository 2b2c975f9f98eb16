"""Two real processes of four devices each train, are killed and resume; other meshes go on from what they saved.

Four minutes on two cores and more, so not in the default suite: `pytest -m slow tests/run/test_processes.py`.
"""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lens_jax import config as config_files
from lens_jax import parallel
from lens_jax.data.datasets import open_data
from lens_jax.data.mixture import START, Position
from lens_jax.data.pipeline import batches
from lens_jax.pretraining.config import SheetConfig, ValidationConfig
from lens_jax.run import store as checkpoint
from lens_jax.run.config import CheckpointConfig, LoggingConfig
from lens_jax.run.log import read_metrics

STEPS, SAVE_EVERY = 12, 2
HEARTBEAT = 10
# Nothing here is timed: a process that has not ended after this long hangs.
HANGS = 1200


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory):
    """One compiled step for all sizes of image; what one life has compiled the next need not compile again."""
    return dataclasses.replace(
        tiny_config,
        steps=STEPS,
        accumulation=1,
        model=dataclasses.replace(tiny_config.model, layers=1, mlp_width=80),
        data=dataclasses.replace(tiny_config.data, batch_size=8, pad_areas=True, languages=("en",)),
        checkpoint=CheckpointConfig(every=SAVE_EVERY, keep=2, keep_every=6),
        samples=SheetConfig(every=0),
        validation=ValidationConfig(every=0),
        logging=LoggingConfig(every=1),
        heartbeat_seconds=HEARTBEAT,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(config, cache, tmp_path_factory) -> Path:
    """The run of two processes that nothing happened to, with all that a run can do."""
    run = tmp_path_factory.mktemp("run") / "whole"
    full = dataclasses.replace(
        config,
        validation=ValidationConfig(every=STEPS, batches=1),
        samples=SheetConfig(every=STEPS, prompts=("red apple",), sizes=("16x16",), num_inference_steps=1),
    )
    Processes(full, run, cache).succeed()
    return run


class Processes:
    """`lens-jax train` in processes that are one run."""

    def __init__(self, config, run: Path, cache: Path, processes: int = 2, devices: int = 4):
        script = run.with_suffix(".py")
        values = json.dumps(config_files.to_dict(dataclasses.replace(config, out=str(run))))
        script.write_text(
            "import json\nfrom lens_jax import config as c\nfrom lens_jax.pretraining.config import TrainConfig\n"
            f"config = c.from_dict(TrainConfig, json.loads({values!r}), 'test')\n"
        )
        ours = ("SLURM_", "OMPI_", "XLA_", "JAX_", "LENS_")
        environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        environ |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        if processes > 1:
            address = f"127.0.0.1:{_free_port()}"
            environ |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
        self.logs = [run.with_suffix(f".{index}.log") for index in range(processes)]
        self.all = []
        for index, log in enumerate(self.logs):
            with log.open("w") as file:
                self.all.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "lens_jax", "train", str(script)],
                        env=environ | ({"JAX_PROCESS_ID": str(index)} if processes > 1 else {}),
                        stdout=file, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip

    def running(self) -> bool:
        return all(process.poll() is None for process in self.all)

    def end(self) -> list[int]:
        """Wait for all; their exit codes."""
        try:
            return [process.wait(HANGS) for process in self.all]
        finally:
            for process in self.all:
                process.kill()

    def text(self, index: int) -> str:
        return self.logs[index].read_text(errors="replace")

    def succeed(self) -> None:
        codes = self.end()
        assert codes == [0] * len(codes), "\n".join(self.text(i)[-3000:] for i in range(len(codes)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def steps_of(run: Path) -> list[int]:
    folder = run / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def saved(run: Path) -> dict:
    """What the newest checkpoint says of itself: the checksum of every array, and the position."""
    metadata = checkpoint.read_metadata(checkpoint.find(run))
    return {"checksums": metadata["checksums"], "position": metadata["position"]}


def test_two_processes_do_all_a_run_does(whole, config):
    assert steps_of(whole) == [6, 10, 12]
    train = read_metrics(whole / "metrics.jsonl", "train")
    assert [record["step"] for record in train] == list(range(1, STEPS + 1))
    assert all(np.isfinite(record["loss"]) for record in train)
    assert len(read_metrics(whole / "metrics.jsonl", "validation")) == 1
    assert (whole / "samples" / f"step_{STEPS:07d}.png").is_file()
    parts = whole / "checkpoints" / str(STEPS) / "params"
    assert {p.name for p in parts.glob("ocdbt.process_*")} == {"ocdbt.process_0", "ocdbt.process_1"}


def kill_often(config, run: Path, cache: Path, kills: int, seed: int) -> None:
    """SIGKILL both processes or one of them, wherever it strikes; one that is left alone must end by itself."""
    rng = random.Random(seed)
    done = 0
    while done < kills:
        before = max(steps_of(run), default=0)
        lives = Processes(config, run, cache)
        if rng.random() < 0.75:
            # After something was saved, so that the run gets somewhere, and then at any moment of the next steps.
            while max(steps_of(run), default=0) == before and lives.running():
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1))
        else:
            # At any moment of starting, meeting, restoring and compiling.
            time.sleep(rng.uniform(0, 12))
        victims = rng.choice([(0, 1), (0, 1), (0,), (1,)])
        if lives.running():
            done += 1
            for victim in victims:
                lives.all[victim].send_signal(signal.SIGKILL)
        codes = lives.end()
        assert max(steps_of(run), default=0) < config.steps, "the run ended before it was killed often enough"
        for index, code in enumerate(codes):
            if index not in victims:
                assert code not in (0, -signal.SIGKILL)
                last = lives.text(index).strip().splitlines()[-1]
                assert re.search(rf"lens-jax: error: process {index} of 2: another process is gone", last), last
    Processes(config, run, cache).succeed()


def test_killed_three_times(config, whole, cache, tmp_path):
    run = tmp_path / "run"
    kill_often(config, run, cache, kills=3, seed=0)
    assert saved(run) == saved(whole)
    steps = [record["step"] for record in read_metrics(run / "metrics.jsonl", "train")]
    assert steps == list(range(1, STEPS + 1))
    assert not [p.name for p in (run / "checkpoints").iterdir() if not p.name.isdigit()]


def test_one_is_told_to_stop_and_one_finds_damage(config, whole, cache, tmp_path):
    """A signal to process 1 alone stops both after the same step; then what only process 1 reads is damaged."""
    run = tmp_path / "run"
    lives = Processes(config, run, cache)
    while not (run / "metrics.jsonl").is_file() or '"step": 3' not in (run / "metrics.jsonl").read_text():
        assert lives.running()
        time.sleep(0.01)
    lives.all[1].send_signal(signal.SIGTERM)
    assert lives.end() == [128 + signal.SIGTERM] * 2, lives.text(0)[-3000:]
    newest = max(steps_of(run))
    assert newest > 2
    assert f"stopped by SIGTERM after step {newest}, saved" in lives.text(0)
    files = [p for p in (run / "checkpoints" / str(newest)).glob("*/ocdbt.process_1/d/*") if p.stat().st_size]
    assert files
    for path in files:
        os.truncate(path, path.stat().st_size // 2)
    again = Processes(config, run, cache)
    again.succeed()
    told = " ".join(again.text(0).split())
    assert re.search(rf"checkpoints/{newest}: .*set aside as {newest}.damaged; step \d+ is used instead", told), told
    assert saved(run) == saved(whole)


def test_other_meshes_restore_the_same_bits(whole):
    """What two processes of four devices saved, on one device, 8, 2, and sharded over `tensor`."""
    script = Path(__file__).with_name("restore_on_meshes.py")
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, str(script), str(whole)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ, timeout=HANGS)
    assert done.returncode == 0, done.stderr[-3000:]
    digests = json.loads(done.stdout)
    assert set(digests) == {"1,1,1,1", "1,8,1,1", "1,2,1,1", "8,1,1,1", "1,4,2,1", "2,2,2,1"}
    assert len(set(digests.values())) == 1, digests


def test_data_goes_on_in_order_on_any_number_of_hosts(whole, config):
    """What two hosts have not read yet, one or four read: the same batches, and in an epoch each image once."""
    position = Position.from_json(checkpoint.read_metadata(checkpoint.find(whole))["position"], "the run")
    assert position.batches == STEPS
    data = open_data(config.data)

    def read(position, count, hosts):
        rows = [lambda size, h=h: np.arange(h * size // hosts, (h + 1) * size // hosts) for h in range(hosts)]
        for parts in zip(*(batches(data, position, count, rows=mine) for mine in rows), strict=True):
            assert len({part["bucket"] for part in parts}) == 1
            pixels = np.concatenate([part["pixels"] for part in parts])
            yield parts[0]["bucket"], pixels, [caption for part in parts for caption in part["captions"]]

    feeds, _ = data.feeds("train")
    # Two epochs of every bucket and more: a batch is eight images.
    end = 3 * sum(-(-feed.records // 8) for feed in feeds)
    before, expected = list(read(START, STEPS, 2)), list(read(position, end - STEPS, 2))
    for hosts in (1, 4):
        for one, other in zip(read(position, end - STEPS, hosts), expected, strict=True):
            assert (one[0], one[2]) == (other[0], other[2])
            np.testing.assert_array_equal(one[1], other[1])
    for feed in feeds:
        bucket = feed.shape.bucket.height, feed.shape.bucket.width
        seen = Counter(i.tobytes() for size, pixels, _ in before + expected if size == bucket for i in pixels)
        assert seen.total() >= 2 * feed.records
        copies = np.array(list(seen.values()))
        # Some scenes look alike; but for these every image has come as often as any other.
        assert seen.total() // feed.records <= np.median(copies) <= seen.total() // feed.records + 1
        assert copies.min() >= seen.total() // feed.records


@pytest.mark.parametrize(("devices", "mesh"), [(8, {}), (2, {}), (8, {"fsdp": 4, "tensor": 2})])
def test_other_meshes_go_on(config, whole, cache, tmp_path, devices, mesh):
    """One process trains on from step 6 of two: the losses of the same batches, but for the order of sums."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in steps_of(run)[1:]:
        shutil.rmtree(run / "checkpoints" / str(step))
    other = dataclasses.replace(config, mesh=parallel.MeshConfig(**mesh))
    lives = Processes(other, run, cache, processes=1, devices=devices)
    lives.succeed()
    assert "after step 6" in lives.text(0)
    losses, expected = ([r["loss"] for r in read_metrics(path / "metrics.jsonl", "train")] for path in (run, whole))
    # Metrics are written with six digits.
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_killed_twenty_times(config, cache, tmp_path):
    steps = 120
    config = dataclasses.replace(config, steps=steps)
    whole, run = tmp_path / "whole", tmp_path / "run"
    Processes(config, whole, cache).succeed()
    kill_often(config, run, cache, kills=20, seed=1)
    assert saved(run) == saved(whole)
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl", "train")] == list(range(1, steps + 1))
    same = [r["loss"] for r in read_metrics(run / "metrics.jsonl", "train")]
    assert same == [r["loss"] for r in read_metrics(whole / "metrics.jsonl", "train")]
