"""The suite measures what it promises, and whatever becomes of one part leaves the others and what is known."""

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lens_jax.bench import measure
from lens_jax.bench.attention import AttentionBench, bench_attention
from lens_jax.bench.suite import command, process, profiles, training
from lens_jax.bench.suite.command import Part, SuiteBench, run_suite
from lens_jax.bench.train import TrainBench
from lens_jax.errors import LensError
from lens_jax.models import attention

# A part that needs no JAX, so that its process starts at once.
FAULTY = """
import os, signal, time
from lens_jax.bench.suite.case import Case

def fails():
    raise ValueError("a|b\\nc")

def hangs():
    open(os.environ["PID_FILE"], "w").write(str(os.getpid()))
    time.sleep(600)

def eats():
    held = bytearray(400_000_000)
    time.sleep(600)

MOST = {"hangs": 1.0}
LEAST = {"too long": 1e6}
RUNS = {
    "fails": fails, "hangs": hangs, "eats": eats, "crashes": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "ends": lambda: os._exit(3), "not finite": lambda: {"seconds": float("nan")},
}

def cases(setting):
    if setting.part == "broken":
        raise RuntimeError("no such device")
    names = setting.part.split(", ")
    run = lambda name: RUNS.get(name, lambda: {"seconds": 0.5, "mfu": 0.25})
    return [Case(name, run(name), least=LEAST.get(name, 0), most=MOST.get(name, 60)) for name in names]
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """What runs parts of a given list of cases, and returns the records."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))

    def run(*names: str, minutes: float = 2, seconds: float = 60) -> list[dict]:
        bench = SuiteBench(minutes=minutes, out=str(tmp_path / "out"))
        run_suite(bench, [Part(name, seconds, "faulty") for name in names])
        return [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]

    run.folder = tmp_path
    return run


def outcomes(records: list[dict]) -> list[tuple[str, str]]:
    return [(record["case"], record["status"]) for record in records]


def test_a_part_that_goes_wrong_leaves_the_others_and_its_own_other_cases(faulty):
    results, seen, over = faulty.folder / "out" / "results.jsonl", [], threading.Event()

    def watch():
        while not over.is_set():
            if results.exists():
                text = results.read_text()
                assert not text or text.endswith("\n")
                seen.append([json.loads(line) for line in text.splitlines()])
            time.sleep(0.002)

    failures = []
    watcher = threading.Thread(target=lambda: _collect(watch, failures))
    watcher.start()
    try:
        records = faulty(
            "one, fails, two", "broken", "crashes, three", "hangs, four", "ends, not finite", "too long, five"
        )
    finally:
        over.set()
        watcher.join()
    assert not failures
    assert len({len(moment) for moment in seen}) > 5  # it grew under the eyes of the watcher
    header, *records = records
    assert header["command"]
    assert header["versions"]["jax"] == jax.__version__
    assert outcomes(records) == [
        ("one", "ok"), ("fails", "failed"), ("two", "ok"), ("", "failed"), ("crashes", "killed"), ("three", "ok"),
        ("hangs", "killed"), ("four", "ok"), ("ends", "killed"), ("not finite", "ok"), ("too long", "skipped"),
        ("five", "ok"),
    ]  # fmt: skip
    by_case = {record["case"]: record for record in records}
    assert by_case["fails"]["error"] == "ValueError: a|b c"
    assert "ended by SIGSEGV" in by_case["crashes"]["error"]
    assert "took more than 1 s" in by_case["hangs"]["error"]
    assert "exit code 3" in by_case["ends"]["error"]
    assert "no such device" in by_case[""]["error"]
    assert by_case["not finite"]["result"] == {"seconds": None}
    # Where it hung is in the log, and the table has a row of as many cells for each.
    assert "in hangs" in (faulty.folder / "out" / "logs" / "hangs, four.log").read_text()
    summary = (faulty.folder / "out" / "summary.md").read_text()
    rows = [line for line in summary.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(records)
    assert len({row.count("|") for row in rows}) == 1
    assert "25.0 %" in summary


def _collect(run, failures: list) -> None:
    try:
        run()
    except BaseException as error:
        failures.append(error)


def test_a_part_that_takes_the_memory_is_ended(faulty, monkeypatch):
    monkeypatch.setattr(process, "available_bytes", lambda: 200_000_000)
    records = faulty("eats, one")[1:]
    assert outcomes(records) == [("eats", "killed"), ("one", "ok")]
    assert "GB of the host's memory" in records[0]["error"]


def test_what_does_not_fit_the_time_is_said(faulty):
    """The suite's own time, and a part's."""
    records = faulty("hangs, one", "two", minutes=0.03)[1:]
    assert {status for _, status in outcomes(records)} <= {"killed", "skipped"}
    assert outcomes(records)[-1] == ("", "skipped")
    assert "needed" in records[-1]["error"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_the_part_and_keeps_what_is_known(faulty, number):
    program = (
        "from lens_jax.bench.suite.command import *\n"
        f"bench = SuiteBench(out={str(faulty.folder / 'out')!r})\n"
        "run_suite(bench, [Part(name, 60, 'faulty') for name in ('one, hangs', 'two')])"
    )
    # The hanging case is left long enough.
    module = faulty.folder / "faulty.py"
    module.write_text(module.read_text().replace('"hangs": 1.0', '"hangs": 60'))
    suite = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    pid_file = faulty.folder / "pid"
    _wait_for(lambda: pid_file.exists() and pid_file.read_text())
    suite.send_signal(number)
    code = suite.wait(30)
    child = int(pid_file.read_text())
    _wait_for(lambda: not _alive(child))
    records = [json.loads(line) for line in (faulty.folder / "out" / "results.jsonl").read_text().splitlines()][1:]
    if number == signal.SIGKILL:  # nothing could be said, but the device is free again
        assert outcomes(records) == [("one", "ok")]
        return
    assert code == 128 + number
    assert outcomes(records) == [("one", "ok"), ("hangs", "killed"), ("", "stopped")]
    assert "told to stop" in (faulty.folder / "out" / "summary.md").read_text()


def _wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _suite(out: Path, *options: str) -> list[dict]:
    """The command as a user gives it, on a CPU; its records."""
    arguments = [sys.executable, "-m", "lens_jax", "bench", "suite", "--size", "tiny", "--out", str(out), *options]
    # An installed libtpu that is not of this JAX would crash the profiler.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_command(tmp_path):
    header, *records = _suite(tmp_path, "--parts", "device", "attention")
    assert header["revision"] or header["lens_jax"]
    assert header["command"].startswith("lens-jax bench suite --size tiny")
    assert {record["part"]: record["status"] for record in records} == {"device": "ok", "attention": "ok"}
    assert all(record["result"]["equal"] for record in records if record["part"] == "attention")


def test_no_accelerator_is_said(tmp_path):
    records = _suite(tmp_path, "--size", "lens", "--parts", "device")
    assert "sees no accelerator" in records[1]["error"]


@pytest.mark.slow
def test_every_part_at_tiny_size(tmp_path, goldens):
    records = _suite(tmp_path, "--minutes", "20")[1:]
    assert {record["part"] for record in records} == {part.name for part in command.PARTS}
    assert [record for record in records if record["status"] != "ok"] == []
    by_case = {(record["part"], record["case"]): record["result"] for record in records}
    assert by_case["golden", "float32, highest precision"]["golden"] == str(goldens / "tiny_release")
    assert all(result["equal"] for (part, _), result in by_case.items() if part == "golden")
    for part in ("denoiser", "train", "text", "autoencoder", "sample"):
        assert all(record["result"]["seconds"] > 0 for record in records if record["part"] == part)
    assert {path.name.split(".")[0] for path in (tmp_path / "profile").iterdir()} == {"forward", "train"}


def test_options():
    with pytest.raises(LensError, match=r"no part 'denoise' \(did you mean 'denoiser'\?\)"):
        SuiteBench(parts=("denoise",))
    with pytest.raises(LensError, match="--minutes is 0"):
        SuiteBench(minutes=0)
    with pytest.raises(LensError, match="--golden nowhere: holds no golden_io"):
        SuiteBench(golden="nowhere")


@pytest.mark.slow
def test_a_wrong_kernel_is_not_equal(monkeypatch):
    """Lengths that are not read, forward; and the same with them read."""
    bench = AttentionBench(image_tokens=10, text_tokens=6, lengths=(6, 2), heads=2, head_dim=16, repeats=1)
    assert bench_attention(bench)["equal"]
    wrong = lambda q, k, v, lengths: attention._library(q, k, v, None, "xla")
    monkeypatch.setitem(attention._KERNELS, "blocked", wrong)
    result = bench_attention(bench)
    assert not result["equal"]
    assert result["forward_error"] > 0.1 > 0.01 > result["xla_forward_error"]


@pytest.mark.slow
def test_blocks_that_fit():
    bench = TrainBench(config="pretrain_512", size="tiny", grid=(2, 2), batch_size=2, text_tokens=3, remat="none")
    needed = training._bytes(dataclasses.replace(bench, layers=2), "cpu")
    assert training.blocks_that_fit(bench, None) == 4
    assert training.blocks_that_fit(bench, round(1.01 * needed / training._FILL)) == 2
    assert training.blocks_that_fit(bench, 10**6) == 0


def test_random_weights_leave_nothing_at_zero():
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    weights = measure.random_weights({"norm": {"scale": leaf(500)}, "out": {"kernel": leaf(500)}}, jax.random.key(0))
    assert {array.dtype for array in jax.tree.leaves(weights)} == {jnp.dtype("bfloat16")}
    assert 0.9 < float(weights["norm"]["scale"].mean()) < 1.1
    assert 0.01 < float(weights["out"]["kernel"].std()) < 0.03


def test_slowest_kernels_of_a_gpu_trace(tmp_path):
    """As a GPU's trace has it: kernels on streams, and rows that tell the same again."""
    name = lambda kind, pid, tid, value: {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": value}}
    event = lambda tid, what, microseconds: {"ph": "X", "pid": 1, "tid": tid, "name": what, "dur": microseconds}
    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 9, "args": {"name": "/host:CPU"}},
        name("thread_name", 1, 13, "Stream #13(Compute)"), name("thread_name", 1, 2, "XLA Modules"),
        name("thread_name", 9, 1, "python"),
        event(13, "gemm", 1500), event(13, "norm", 200), event(13, "gemm", 500), event(2, "jit_step", 9000),
        {"ph": "X", "pid": 9, "tid": 1, "name": "dispatch", "dur": 9000}, {},
    ]  # fmt: skip
    trace = tmp_path / "trace.json.gz"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert profiles.slowest(trace) == ["2 ms in 2: gemm", "0.2 ms in 1: norm"]


def test_a_profile_that_is_too_large_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "_MOST_BYTES", 1000)
    (tmp_path / "small.pb").write_bytes(bytes(10_000))
    (tmp_path / "large.pb").write_bytes(os.urandom(2000))
    (tmp_path / "kept").mkdir()
    assert profiles._keep(tmp_path / "small.pb", tmp_path / "kept" / "small.gz")
    assert not profiles._keep(tmp_path / "large.pb", tmp_path / "kept" / "large.gz")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["small.gz"]
