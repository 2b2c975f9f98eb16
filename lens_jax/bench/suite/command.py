"""`lens-jax bench suite`: orders the parts by value, shares out the time, keeps what is known; touches no device."""

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from lens_jax.bench.suite import process
from lens_jax.bench.suite.case import Setting
from lens_jax.bench.suite.header import header
from lens_jax.bench.suite.results import Results, line, write_summary
from lens_jax.console import make_console
from lens_jax.errors import LensError, nearest

# Of the time, left for the summary.
_LAST_SECONDS = 4.0
# A part is not started with less: a process needs that to import JAX and to take the device.
_START_SECONDS = 12.0
# Times that a part is started anew behind a case that ended its process.
_RESTARTS = 3
# Of the host's memory that is free, what a part may take.
_MEMORY_SHARE = 0.85


@dataclasses.dataclass(frozen=True)
class Part:
    """Measurements that share a process, and the most seconds of a suite of nine minutes that they may take."""

    name: str
    seconds: float
    # Has a function `cases(setting)`.
    module: str


def _parts(*seconds: tuple[str, float, str]) -> tuple[Part, ...]:
    return tuple(Part(name, most, f"lens_jax.bench.suite.{module}") for name, most, module in seconds)


# By value. What is measured of each network first comes in the first nine; the last two take what time is left. The
# seconds are bounds, more than nine minutes together: mostly for compiling, which was not measured on a GPU yet.
PARTS = _parts(
    ("device", 40, "device"),
    ("attention", 60, "kernels"),
    ("denoiser", 90, "networks"),
    ("golden", 50, "golden"),
    ("sample", 150, "networks"),
    ("train", 150, "training"),
    ("text", 90, "networks"),
    ("autoencoder", 50, "networks"),
    ("profile", 60, "profiles"),
    ("denoiser_more", 300, "networks"),
    ("train_more", 300, "training"),
)


@dataclasses.dataclass(frozen=True)
class SuiteBench:
    """Every measurement of this device in one command, most valuable first, each as soon as it is known."""

    # Minutes that the command may take in all; what does not fit is left out, and said to be.
    minutes: float = 9
    # Folder for results.jsonl, summary.md, logs/ and profile/. Results there are added to.
    out: str = "bench"
    # The release's sizes, or small ones that a CPU runs in two minutes, to try the command.
    size: Literal["lens", "tiny"] = "lens"
    # Only these parts, in this order; empty is all.
    parts: tuple[str, ...] = ()
    # Folder of the tiny release with its golden; empty is tests/goldens/tiny_release of the source tree or of the
    # current folder, and where there is none the device is compared with the CPU.
    golden: str = ""

    def __post_init__(self):
        if not self.minutes > 0:
            raise LensError(f"--minutes is {self.minutes}; it must be positive")
        known = [part.name for part in PARTS]
        for name in self.parts:
            if name not in known:
                raise LensError(f"--parts: no part {name!r}{nearest(name, known)}; accepted: {', '.join(known)}")
        if self.golden and not Path(self.golden, "golden_io.safetensors").is_file():
            raise LensError(f"--golden {self.golden}: holds no golden_io.safetensors")


def bench_suite(bench: SuiteBench) -> None:
    """Run the parts and write DIR; exits with 128 + signal where it was told to stop, else with 0."""
    named = {part.name: part for part in PARTS}
    run_suite(bench, [named[name] for name in bench.parts] if bench.parts else PARTS)


def run_suite(bench: SuiteBench, parts: Sequence[Part]) -> None:
    """`bench_suite` of any parts."""
    started = time.monotonic()
    deadline = started + 60 * bench.minutes - min(_LAST_SECONDS, 6 * bench.minutes)
    out = Path(bench.out)
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LensError(f"{out}: cannot be written: {error.strerror}") from None
    results, console = Results(out / "results.jsonl"), make_console()
    cache = tempfile.mkdtemp(prefix="lens-jax-suite-")
    environment = _environment(cache, bench.size)
    about = header(environment)

    def add(part: str, case: str, status: str, seconds: float, **values) -> None:
        at = time.monotonic() - started
        results.add({"part": part, "case": case, "status": status, "at": at, "took": seconds, **values})
        console.print(f"{at:6.1f} s  {line(results.records[-1])}")

    with _listening() as stopped:
        try:
            now = time.strftime("%FT%TZ", time.gmtime())
            results.add({"part": "suite", "case": "header", "status": "ok", "time": now, **about})
            longer = max(1.0, bench.minutes / 9)
            for part in parts:
                if not stopped():
                    _run_part(part, longer * part.seconds, bench, deadline, environment, add, stopped)
            if stopped():
                add("suite", "", "stopped", time.monotonic() - started, error=signal.Signals(stopped()).name)
        finally:
            shutil.rmtree(cache, ignore_errors=True)
            write_summary(out / "summary.md", about, results.records[1:])
            results.close()
    console.print(f"{time.monotonic() - started:.0f} s; {out / 'results.jsonl'}, {out / 'summary.md'}, {out / 'logs'}")
    if stopped():
        sys.exit(128 + stopped())


def _run_part(part: Part, most: float, bench: SuiteBench, deadline: float, environment: dict, add, stopped) -> None:
    """A part, started anew behind a case that ended its process."""
    end = min(deadline, time.monotonic() + most)
    golden = bench.golden and str(Path(bench.golden).absolute())
    setting = Setting(bench.size, part.name, str(Path(bench.out).absolute()), golden)
    log = Path(bench.out, "logs", f"{part.name}.log")
    done: list[str] = []

    def receive(message: dict) -> None:
        add(part.name, message.pop("case"), message.pop("status"), message.pop("seconds"), **message)

    for start in range(1 + _RESTARTS):
        left, floor = end - time.monotonic(), min(_START_SECONDS, most / 4)
        if left < floor:
            why = f"{max(0, left):.0f} s left, at least {floor:.0f} needed"
            add(part.name, "the rest" if start else "", "skipped", 0.0, error=why)
            return
        memory = int(_MEMORY_SHARE * process.available_bytes())
        ending = process.run_cases(part.module, setting, done, end, log, receive, environment, memory, stopped)
        done += ending.done
        if ending.why:
            where = ending.case or "between cases"
            add(part.name, where, "killed", ending.seconds, error=f"{ending.why}; see logs/{log.name}")
        if ending.stuck:
            add(part.name, ending.case, "stuck", 0.0, error="the process cannot be ended and may hold the device")
        if not ending.case or stopped():
            # To the end; or before the first case or behind the last one, where trying again would be the same.
            return
        done.append(ending.case)


def _environment(cache: str, size: str) -> dict[str, str]:
    """A child's: what is set already wins."""
    defaults = {
        # Programs that several parts use are compiled once; a folder of this run's own, so that times are of this run.
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        # The rest is for cuDNN's and cuBLAS's own.
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "PYTHONUNBUFFERED": "1",
    }
    if size == "tiny":
        # Speed is not the point, and compiling is most of the time.
        defaults["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    return {**defaults, **os.environ}


@contextlib.contextmanager
def _listening() -> Iterator[Callable[[], int]]:
    """Inside, SIGINT, SIGTERM and SIGHUP only change what the function says: the first one's number, 0 before.

    An exception could come while a result is written or a child is being ended.
    """
    first: list[int] = []
    listen = lambda number, frame: first.append(number)
    before = {number: signal.signal(number, listen) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield lambda: first[0] if first else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
