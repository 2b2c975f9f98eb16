"""A worker: a process that opens a stage once and runs the units that it is sent."""

import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from lens_jax.data.engine.config import EngineConfig
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.processes import die_with_parent
from lens_jax.data.engine.run_unit import Done, Runner
from lens_jax.data.engine.stage import Stage, StopRun
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError

# Places in the array that a worker and its supervisor share: the time of the last sign of life, and images so far.
BEAT, ITEMS = 0, 1


@dataclass(frozen=True)
class Ready:
    """The stage is open."""


@dataclass(frozen=True)
class Broken:
    """The stage cannot be run, on any unit."""

    message: str


@dataclass(frozen=True)
class Failed:
    """The unit cannot be done, and will not be if it is tried again."""

    unit: str
    message: str


@dataclass(frozen=True)
class Raised:
    """The unit ended with an error that nobody foresaw; another attempt may mend it."""

    unit: str
    message: str


def main(
    pipe: Connection, shared: MutableSequence[float], stage: Stage, config: EngineConfig, layout: Layout, log: Path
) -> None:
    """Run units from `pipe` until it ends. What libraries print goes to the file `log`."""
    die_with_parent()
    # Ctrl-C reaches the whole group of processes; who is stopped, and when, is the supervisor's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    _print_to(log)
    faulthandler.enable()

    def beat() -> None:
        shared[BEAT] = time.time()
        shared[ITEMS] += 1

    try:
        runner = Runner(stage, config, layout)
    except LensError as error:
        pipe.send(Broken(str(error)))
        return
    pipe.send(Ready())
    while True:
        try:
            unit: Unit | None = pipe.recv()
        except (EOFError, ConnectionError):
            return  # the supervisor is gone
        if unit is None:
            return
        pipe.send(_run(runner, unit, beat))


def _run(runner: Runner, unit: Unit, beat: Callable[[], None]) -> Done | Failed | Raised | Broken:
    try:
        return runner(unit, beat)
    except StopRun as error:
        return Broken(str(error))
    except LensError as error:
        return Failed(unit.id, str(error))
    except Exception as error:
        print(f"{unit.id} {unit.path} part {unit.part}:", file=sys.stderr)
        traceback.print_exc(file=sys.stderr)
        return Raised(unit.id, f"{type(error).__name__}: {error}"[:300])


def _leave(*_) -> None:
    """Unwind, so that no half of a file and no note of an attempt is left."""
    raise SystemExit(128 + signal.SIGTERM)


def _print_to(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
