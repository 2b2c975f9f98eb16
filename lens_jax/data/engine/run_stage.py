"""A stage on all units of a run, or on this machine's share of them."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from lens_jax.data.engine import attempts
from lens_jax.data.engine.config import EngineConfig
from lens_jax.data.engine.layout import Layout, names
from lens_jax.data.engine.live import live
from lens_jax.data.engine.losses import check_losses
from lens_jax.data.engine.run_unit import Done, found
from lens_jax.data.engine.stage import Stage
from lens_jax.data.engine.supervisor import Options, Progress, Supervisor
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError


def run_stage(
    stage: Stage, config: EngineConfig, layout: Layout, units: Sequence[Unit], options: Options, show: bool = True
) -> Progress:
    """Run `stage` on those of `units` that are this machine's and have no table yet; the counts of all of those.

    Stopped or killed, the same call goes on. LensError where too much is lost or units have failed for good, unless
    `options.accept_losses`.
    """
    mine = units[options.host :: options.hosts]
    folder = layout.folder(stage.name)
    folder.mkdir(parents=True, exist_ok=True)
    remove_partials(folder)
    finished, given_up = layout.finished(stage.name), layout.given_up(stage.name)
    progress = Progress(stage.name, len(mine))
    for done in _found(layout, stage.name, [unit for unit in mine if unit.id in finished]):
        progress.add(done)
    progress.failed.update({unit.id: given_up[unit.id] for unit in mine if unit.id in given_up})
    missing = [unit for unit in mine if unit.id not in finished and unit.id not in given_up]
    with stopping_at_sigterm(), live(progress, show and bool(missing)) as refresh:
        Supervisor(stage, config, layout, options, progress, refresh).run(missing)
    for source, counts in progress.counts.items():
        check_losses(stage.name, source, counts, options, at_end=True)
    if progress.failed and not options.accept_losses:
        unit, message = next(iter(progress.failed.items()))
        raise LensError(
            f"stage {stage.name}: {len(progress.failed)} of {len(mine)} units failed, the first {unit}: {message}; "
            "--retry-failed tries them again, --accept-losses goes on without them"
        )
    return progress


def retry_failed(layout: Layout, stages: Sequence[str], units: Sequence[Unit]) -> int:
    """Forget failures, so that the next run tries them again; how many units that are.

    Also of units in which images ended their process: their tables go, and those of the stages that came after.
    """
    count = 0
    for position, stage in enumerate(stages):
        count += len(layout.given_up(stage))
        forget_failures(layout, stage)
        finished = layout.finished(stage)
        for done in _found(layout, stage, [unit for unit in units if unit.id in finished]):
            if done.culprits:
                count += 1
                for later in stages[position:]:
                    layout.table(later, done.unit).unlink(missing_ok=True)
    return count


def forget_failures(layout: Layout, stage: str) -> None:
    """Let the next run try again what has failed in a stage."""
    for unit in layout.given_up(stage):
        layout.failed(stage, unit).unlink(missing_ok=True)
        attempts.clear(layout.attempts(stage, unit))


def read_log(layout: Layout, stage: str) -> dict[str, dict]:
    """What is noted of each unit that was run: counts, seconds, cpu_seconds, memory, time. Its last run counts."""
    lines: dict[str, dict] = {}
    for name in names(layout.logs(stage)):
        with open(layout.logs(stage) / name, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, TypeError, KeyError):  # half a line, of a process that was killed
                    entry = json.loads(line)
                    if entry["time"] >= lines.get(entry["unit"], entry)["time"]:
                        lines[entry["unit"]] = entry
    return lines


def _found(layout: Layout, stage: str, units: Sequence[Unit]) -> Iterator[Done]:
    """Units that have a table, by the log where it tells of them: a hundred times faster than opening each."""
    log = read_log(layout, stage) if units else {}
    for unit in units:
        entry = log.get(unit.id)
        if entry is not None and isinstance(entry.get("counts"), dict):
            yield Done(unit.id, unit.source, entry["counts"], True, culprits=tuple(entry.get("culprits", ())))
        else:
            yield found(layout, stage, unit)


@contextlib.contextmanager
def stopping_at_sigterm():
    """SIGTERM as an exception, so that workers are stopped and notes undone; the exit code is a shell's, 143."""

    def leave(*_):
        raise SystemExit(128 + signal.SIGTERM)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread: whoever that is decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def remove_partials(folder: Path) -> None:
    """Remove what processes of this machine that are gone had not finished writing."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            head, _, process = name.rpartition("-")
            if ".partial-" in name and head.endswith(f".partial-{os.uname().nodename}") and not _alive(process):
                (folder / name).unlink(missing_ok=True)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
