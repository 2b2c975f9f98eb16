"""Careful mode: the images of a unit one at a time in a child process, so that the one that kills it is known.

A decoder that crashes takes its process with it, and one that loops or swallows memory would take the machine. The
child has a limit of both. An image that it dies of is given to the stage again as one that cannot be read, and so has a
row like any other; the next child goes on after it.
"""

import dataclasses
import resource
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

import pyarrow as pa

from lens_jax.data.engine import processes
from lens_jax.data.engine.config import EngineConfig
from lens_jax.data.engine.stage import Stage, UnitInput
from lens_jax.errors import LensError

CRASHED, TOO_LONG, TOO_LARGE = "decoder crashed", "timed out", "out of memory"
# Loading models may take long, and is no image's fault.
OPEN_SECONDS = 1800.0
# A child ends at the first image that it cannot do; so many that end before any image are not the images' fault.
_START_FAILURES = 3


def run(stage: Stage, config: EngineConfig, given: UnitInput) -> tuple[pa.Table, dict[str, str]]:
    """(the unit's table, the reasons of the images that ended their process, by key)."""
    parts: list[pa.Table] = []
    culprits: dict[int, tuple[str, str, str]] = {}
    failures = 0
    while True:
        began = len(parts)
        culprit = _child(stage, config, given, parts, culprits)
        if culprit is None:
            break
        index, key, reason, detail = culprit
        if key is None:  # it died between images: in the reader, or while it loaded
            failures = failures + 1 if len(parts) == began else 1
            if failures == _START_FAILURES:
                raise LensError(f"{given.unit.path}: stage {stage.name} dies before its image {index}: {detail}")
        else:
            if index in culprits:  # even as one that cannot be read
                raise LensError(f"{given.unit.path}: stage {stage.name} fails at {key!r:.200}, read or not: {detail}")
            culprits[index] = (key, reason, detail)
    if not parts:
        # Of a unit without images: the stage knows what its empty table looks like.
        parts.append(stage.open(config)(dataclasses.replace(given, given=())))
    table = pa.concat_tables(parts).combine_chunks()
    return table, {key: reason for key, reason, _ in culprits.values()}


def _child(stage, config, given, parts, culprits):
    """Run a child until it has done all or dies; (index, key, reason, detail) of where it died, None if it did all.

    `parts` is added to. The key is None where it died with no image in hand.
    """
    context = processes.context()
    ours, theirs = context.Pipe()
    plain = dataclasses.replace(given, beat=_nothing)
    process = context.Process(
        target=_main, args=(theirs, stage, config, plain, len(parts), culprits, config.item_memory), daemon=True
    )
    process.start()
    theirs.close()
    index, key, limit = len(parts), None, OPEN_SECONDS
    try:
        while True:
            if not _wait(ours, limit, given.beat):
                return index, key, TOO_LONG, f"over {limit:g} seconds"
            kind, *values = ours.recv()
            if kind == "image":
                index, key = values
                limit = config.item_seconds
            elif kind == "table":
                parts.append(pa.ipc.open_stream(values[0]).read_all())
                # The time until the next image is the reader's, of a whole tar perhaps.
                index, key, limit = len(parts), None, OPEN_SECONDS
            elif kind == "end":
                return None
            elif kind == "bad input":
                raise LensError(values[0])
            else:
                return index, key, TOO_LARGE if values[0] == "MemoryError" else CRASHED, values[1]
    except (EOFError, ConnectionError):
        process.join(10)
        code = process.exitcode
        return index, key, CRASHED, f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    finally:
        process.kill()
        process.join()
        ours.close()


def _wait(pipe: Connection, seconds: float, beat: Callable[[], None]) -> bool:
    """Whether the pipe has something within that time. This process lives meanwhile, and says so."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        beat()
        if pipe.poll(min(left, 1.0)):
            return True
    return False


def _nothing() -> None:
    pass


def _main(
    pipe: Connection,
    stage: Stage,
    config: EngineConfig,
    given: UnitInput,
    start: int,
    culprits: dict[int, tuple[str, str, str]],
    limit: int,
) -> None:
    from lens_jax.data.engine.readers import Problem

    processes.die_with_parent()
    try:
        run_part = stage.open(config)
        _limit_memory(limit)
        for index, item in given.items():
            if index < start:
                continue
            pipe.send(("image", index, item.key))
            if index in culprits:
                item = Problem(*culprits[index])
            tables = {name: table.slice(index, 1) for name, table in given.tables.items()}
            table = run_part(dataclasses.replace(given, tables=tables, given=((index, item),)))
            pipe.send(("table", _to_bytes(table)))
        pipe.send(("end",))
    except LensError as error:
        pipe.send(("bad input", str(error)))
    except BaseException as error:
        traceback.print_exc(file=sys.stderr)
        pipe.send(("error", type(error).__name__, f"{type(error).__name__}: {error}"[:200]))


def _limit_memory(more: int) -> None:
    """At most `more` bytes of address space beyond what the models took."""
    try:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return  # not Linux: there is no telling what is used, and the limit of time remains
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = now + more
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
