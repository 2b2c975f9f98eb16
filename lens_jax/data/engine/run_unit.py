"""One unit through one stage: once, whoever is asked to, and however often."""

import contextlib
import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyarrow as pa

from lens_jax import __version__
from lens_jax.data.engine import attempts, careful
from lens_jax.data.engine.config import EngineConfig
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.outcomes import outcomes
from lens_jax.data.engine.stage import Stage, StopRun, UnitInput
from lens_jax.data.engine.tables import read_metadata, read_table, write_table
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError

# Runs of a unit, its images tried one by one, after which it is given up: then it is not the images that it dies of.
CAREFUL_ATTEMPTS = 3


@dataclass(frozen=True)
class Done:
    """A unit that has a table."""

    unit: str
    source: str
    # Images by what became of them; "ok" where nothing was wrong.
    counts: Mapping[str, int]
    # The table was there already.
    found: bool = False
    # Wall and processor time, over all threads.
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    # Resident memory of the worker, afterwards.
    memory: int = 0
    # Images that were tried one by one and ended their process.
    culprits: tuple[str, ...] = ()


class GivenUp(LensError):
    """A unit that is not to be tried again."""


class Runner:
    """A stage in a process: opened once, then run for unit after unit."""

    def __init__(self, stage: Stage, config: EngineConfig, layout: Layout):
        self.stage, self.config, self.layout = stage, config, layout
        self._open = stage.open(config)

    def __call__(self, unit: Unit, beat: Callable[[], None] = lambda: None) -> Done:
        """Make the table of a unit, where it is not there yet. What it raises is for another attempt to mend, if it is
        no LensError; `attempts` has the note of it."""
        name = self.stage.name
        path = self.layout.table(name, unit.id)
        if path.exists():
            return found(self.layout, name, unit)
        notes = self.layout.attempts(name, unit.id)
        before = attempts.count(notes)
        if before >= self.config.attempts + CAREFUL_ATTEMPTS:
            raise GivenUp(f"{unit.path}: stage {name} failed {before} times{attempts.last_words(notes)}")
        note = attempts.note(notes)
        started, cpu = time.monotonic(), _cpu()
        try:
            table, culprits = self._table(unit, before >= self.config.attempts, beat)
        except (LensError, KeyboardInterrupt, SystemExit):
            # It was stopped, or it says itself that it cannot be done: nothing died of it.
            note.unlink(missing_ok=True)
            raise
        counts = outcomes(table)
        metadata = {
            "unit": unit.id,
            "source": unit.source,
            "stage": name,
            "version": __version__,
            "counts": json.dumps(counts, sort_keys=True),
        }
        if culprits:
            metadata["culprits"] = json.dumps(culprits, sort_keys=True)
        try:
            write_table(path, table, metadata)
        except LensError as error:
            raise StopRun(str(error)) from None
        attempts.clear(notes)
        seconds, cpu = time.monotonic() - started, _cpu() - cpu
        return Done(unit.id, unit.source, counts, False, seconds, cpu, memory(), tuple(culprits))

    def _table(self, unit: Unit, one_by_one: bool, beat: Callable[[], None]) -> tuple[pa.Table, dict[str, str]]:
        if (members := getattr(self.stage, "members", None)) is not None:
            parts = [unit_input(member, self.stage, self.config, self.layout, beat) for member in members[unit.id]]
            return self._open(unit, parts), {}
        given = unit_input(unit, self.stage, self.config, self.layout, beat)
        if one_by_one and getattr(self.stage, "by_item", True):
            return careful.run(self.stage, self.config, given)
        return self._open(given), {}


def unit_input(
    unit: Unit, stage: Stage, config: EngineConfig, layout: Layout, beat: Callable[[], None] = lambda: None
) -> UnitInput:
    """What `stage` is given of a unit; LensError where a stage that it reads has not been run on it."""
    tables = {}
    of_unit = getattr(stage, "reads_of", None)
    for name in of_unit(config, unit) if of_unit else stage.reads:
        path = layout.table(name, unit.id)
        if not path.exists():
            raise LensError(f"{unit.path}: stage {stage.name} reads stage {name}, which has not been run: {path}")
        tables[name] = read_table(path)
    return UnitInput(unit, config.source(unit.source), tables, beat=beat)


def found(layout: Layout, stage: str, unit: Unit) -> Done:
    """A unit whose table is there already."""
    metadata = read_metadata(layout.table(stage, unit.id))
    with contextlib.suppress(KeyError, ValueError):
        culprits = tuple(json.loads(metadata.get("culprits", "{}")))
        return Done(unit.id, unit.source, json.loads(metadata["counts"]), True, culprits=culprits)
    raise LensError(f"{layout.table(stage, unit.id)}: not a table of this engine; remove it")


def _cpu() -> float:
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)


def memory() -> int:
    """Resident bytes of this process; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
    return 0
