"""`lens-jax data`: what its actions take, and what they do."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from lens_jax.data.engine import build as building
from lens_jax.data.engine import remove as removing
from lens_jax.data.engine import removed, status, units, why
from lens_jax.data.engine.config import EngineConfig
from lens_jax.data.engine.layout import load_layout
from lens_jax.data.engine.supervisor import Options
from lens_jax.errors import LensError, nearest

USAGE = """\
usage: lens-jax data build|run|plan|caption|status|report|why|remove ... [OPTIONS]

From raw collections of images to data sets that training reads: decoded, cleaned in the report's nine steps,
captioned, packed. CONFIG is a python file that defines `config`, a lens_jax.data.engine.config.EngineConfig, or one
that comes with the package: data_example. Every field of it is an option.

  build CONFIG              all of it on this machine; the same command goes on where it stopped
  run CONFIG STAGE          one stage, or with --host and --hosts this machine's share of it
  plan CONFIG               what N images will cost, from a timed sample of these
  caption CONFIG            captions alone; --dry-run says what they will cost
  status CONFIG             how far it is, who is at work, what has failed
  report CONFIG             write the report page of what there is
  why CONFIG ID             all that is known of an image, by id, key, URL or sha256
  remove OUT --ids FILE     take images out of packed data sets, and keep them out

Each answers --help; docs/data_engine.md has more.
"""


@dataclasses.dataclass(frozen=True)
class Build:
    """Build the data sets of a config."""

    # The run itself.
    config: Annotated[EngineConfig, tyro.conf.arg(name="")]
    # Processes; by default one a core. 0 does it all in this process.
    workers: int | None = None
    # Go on where a source loses more than half of its images, or where units have failed.
    accept_losses: bool = False
    # Try again what has failed, and images that ended their process.
    retry_failed: bool = False
    # Stop at the first image that cannot be decoded.
    strict: bool = False
    # Replace data sets in `out` that are of other images or settings.
    overwrite: bool = False
    # Decode all that is written again, and not only one in a hundred.
    verify: bool = False

    def __post_init__(self):
        at_least("--workers", self.workers, 0)

    def options(self) -> Options:
        workers = building.cores() if self.workers is None else self.workers
        return Options(workers, self.accept_losses, self.strict)


@dataclasses.dataclass(frozen=True)
class RunStage:
    """Run one stage, here or on one of several machines that share the work folder."""

    # Which: probe, measure, score, embed, keep, select, caption, write.
    stage: tyro.conf.Positional[str]
    # The run itself.
    config: Annotated[EngineConfig, tyro.conf.arg(name="")]
    # Processes; by default one a core. 0 does it all in this process.
    workers: int | None = None
    # This machine runs every `hosts`-th unit, from number `host` on.
    host: int = 0
    hosts: int = 1
    # Go on where a source loses more than half of its images, or where units have failed.
    accept_losses: bool = False
    # Try again what has failed, and images that ended their process.
    retry_failed: bool = False
    # Stop at the first image that cannot be decoded.
    strict: bool = False

    def __post_init__(self):
        at_least("--workers", self.workers, 0)
        at_least("--hosts", self.hosts, 1)
        if not 0 <= self.host < self.hosts:
            raise LensError(f"--host is {self.host}, --hosts {self.hosts}; hosts count from 0")

    def options(self) -> Options:
        workers = building.cores() if self.workers is None else self.workers
        return Options(workers, self.accept_losses, self.strict, self.host, self.hosts)


@dataclasses.dataclass(frozen=True)
class Look:
    """Look at a run."""

    # The run itself.
    config: Annotated[EngineConfig, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class Why:
    """Say all that is known of an image."""

    # Its id or sha256, or the beginning of one in hexadecimal digits; its key; its URL.
    id: tyro.conf.Positional[str]
    # The run itself.
    config: Annotated[EngineConfig, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class Remove:
    """Take images out of packed data sets; later builds into the same folder leave them out."""

    # The folder of the data sets, the config's `out`.
    out: tyro.conf.Positional[str]
    # A text file with an id a line, 32 hexadecimal digits.
    ids: str


def at_least(name: str, value: int | None, least: int) -> None:
    """LensError for an option that is too small."""
    if value is not None and not isinstance(value, type(tyro.MISSING)) and value < least:
        raise LensError(f"{name} is {value}; it must be at least {least}")


def run_build(options: Build) -> None:
    page = building.build(options.config, options.options(), options.retry_failed, options.overwrite, options.verify)
    building.say(f"report: {page}")


def run_stage(options: RunStage) -> None:
    building.run_one(options.config, options.stage, options.options(), options.retry_failed)


def run_status(options: Look) -> None:
    layout = load_layout(options.config.work)
    everything = units.read_units(options.config.work)
    of = {stage: everything for stage in layout.fingerprints if stage != "write"}
    if (layout.work / "groups.parquet").is_file():
        of["write"] = units.read_units(layout.work, "groups")
    status.show(layout, of)


def run_report(options: Look) -> None:
    run = building.Run(options.config, Options(accept_losses=True))
    run.join()
    building.say(f"report: {run.report()}")


def run_why(options: Why) -> None:
    layout = load_layout(options.config.work)
    sources = {source.name: source.path for source in options.config.sources}
    for story in why.find(layout, units.read_units(options.config.work), options.id):
        for line in why.lines(story, sources.get(story.unit.source, "")):
            building.say(line)


def run_remove(options: Remove) -> None:
    ids = removed.read_ids(Path(options.ids))
    if not ids:
        raise LensError(f"{options.ids}: no ids in it; write one a line, 32 hexadecimal digits")
    outcome = removing.remove(Path(options.out), ids)
    text = f"{outcome.records:,} images removed from {outcome.shards:,} shards"
    if outcome.unknown:
        text += f"; {outcome.unknown:,} ids are in no data set here, and are kept out of later ones"
    building.say(text)


# By name: what it takes, and what it does. All but `remove` begin with a config.
ACTIONS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "build": (Build, run_build),
    "run": (RunStage, run_stage),
    "status": (Look, run_status),
    "report": (Look, run_report),
    "why": (Why, run_why),
    "remove": (Remove, run_remove),
}


def action(name: str) -> tuple[type, Callable[[Any], None]]:
    """What `lens-jax data NAME` takes and does."""
    if name not in ACTIONS:
        raise LensError(f"no action {name!r}{nearest(name, ACTIONS)}; accepted: {', '.join(ACTIONS)}")
    return ACTIONS[name]


def with_config(kind: type, config: EngineConfig) -> Any:
    """What an action takes by default with a config: what else must be given is missing."""
    names = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    return kind(**dict.fromkeys(names - {"config"}, tyro.MISSING), config=config)
