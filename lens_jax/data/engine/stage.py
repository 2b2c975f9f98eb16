"""A stage: a pure function of a unit to one table, and what its results are named by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from lens_jax.data.engine.config import EngineConfig, Source
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError

if TYPE_CHECKING:
    from lens_jax.data.engine.readers import Item, Problem


@dataclass(frozen=True)
class UnitInput:
    """What a stage sees of a unit: its items, and the tables that other stages made of it."""

    unit: Unit
    source: Source
    # By the name of the stage; row i of each is about item i.
    tables: Mapping[str, pa.Table]
    # In place of what the reader gives: a part of the items, whose rows alone are in the tables.
    given: tuple[tuple[int, Item | Problem], ...] | None = None
    # Called for each item that is taken: a worker's sign of life.
    beat: Callable[[], None] = lambda: None

    def items(self) -> Iterator[tuple[int, Item | Problem]]:
        """(index, item) in the order of the reader. LensError where the source is not what it was."""
        if self.given is not None:
            yield from self.given
            return
        from lens_jax.data.engine.readers import read

        keys = self.tables["probe"]["key"].to_pylist() if "probe" in self.tables else None
        seen = 0
        for index, item in enumerate(read(self.source, self.unit)):
            self.beat()
            if keys is not None and keys[index : index + 1] != [item.key]:
                raise self._changed(item.key)
            seen += 1
            yield index, item
        if keys is not None and seen < len(keys):
            raise self._changed(keys[seen])

    def _changed(self, key: str) -> LensError:
        return LensError(
            f"{self.unit.path}: the source {self.source.name} is not what it was when it was probed (at {key!r:.200}); "
            "choose another work folder"
        )


class StopRun(LensError):
    """Raised by a stage where no other unit would fare better: no disk, no key, no budget left.

    Any other LensError is about its unit, which is given up, and the others go on.
    """


class Stage(Protocol):
    """A step of the engine. The table of a unit follows from the unit and from what `settings` names, from nothing
    else, so that whoever runs it gets the same bytes."""

    name: str
    # Raised when the code gives other results than it did.
    version: int
    # Names of the stages whose tables it reads.
    reads: tuple[str, ...]
    # A stage that cannot be run on one image alone also has `by_item = False`; one that may need a device a function
    # `processes(config)`: the most processes that should run it on a machine, or None.

    def settings(self, config: EngineConfig) -> Mapping[str, object]:
        """What its results depend on, of a config and of the weights (their sha256): plain JSON values."""

    def open(self, config: EngineConfig) -> Callable[[UnitInput], pa.Table]:
        """Loads its models, once a worker. What it returns is a pure function."""


def fingerprints(
    stages: Mapping[str, Stage], config: EngineConfig, over: Mapping[str, str] | None = None
) -> dict[str, str]:
    """16 hexadecimal digits for each stage: of its version, its settings, the stages it reads that are there, and what
    `over` says of it: of one that looks at all units together, which these are."""
    done: dict[str, str] = {}

    def of(name: str) -> str:
        if name not in done:
            stage = stages[name]
            read = [of(other) for other in stage.reads if other in stages]
            depends = [stage.name, stage.version, dict(stage.settings(config)), read, (over or {}).get(name, "")]
            text = json.dumps(depends, sort_keys=True, default=list)
            done[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return done[name]

    for name in stages:
        of(name)
    return done
