"""Two real processes of four devices each: they train, are killed, resume, and another mesh goes on from what they saved.

The default suite kills three times; `pytest -m slow tests/training/test_processes.py` twenty times.
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
from pathlib import Path

import numpy as np
import pytest

from lens_jax import config as run_config
from lens_jax.training import checkpoint
from lens_jax.training.metrics import read_metrics

STEPS, SAVE_EVERY = 12, 2
HEARTBEAT = 10
# Nothing here is timed: a process that has not ended after this long hangs.
HANGS = 300


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory):
    """One compiled step for all sizes of picture; what one life has compiled the next need not compile again."""
    return dataclasses.replace(
        tiny_config,
        steps=STEPS,
        accumulation=1,
        model=dataclasses.replace(tiny_config.model, layers=1),
        data=dataclasses.replace(tiny_config.data, batch_size=8, pad_areas=True),
        checkpoint=run_config.CheckpointConfig(every=SAVE_EVERY, keep=2, keep_every=6),
        samples=run_config.SampleConfig(every=0),
        validation=run_config.ValidationConfig(every=0),
        logging=run_config.LoggingConfig(every=1),
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
        validation=run_config.ValidationConfig(every=STEPS, batches=1),
        samples=run_config.SampleConfig(every=STEPS, prompts=("red apple",), sizes=("16x16",), num_inference_steps=1),
    )
    Processes(full, run, cache).succeed()
    return run


class Processes:
    """`lens-jax train` in processes that are one run."""

    def __init__(self, config, run: Path, cache: Path, processes: int = 2, devices: int = 4):
        script = run.with_suffix(".py")
        values = json.dumps(run_config.to_dict(dataclasses.replace(config, out=str(run))))
        script.write_text(
            "import json\nfrom lens_jax import config as c\n"
            f"config = c.from_dict(c.TrainConfig, json.loads({values!r}), 'test')\n"
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


@pytest.mark.slow
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
