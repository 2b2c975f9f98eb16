"""`lens-jax data`: what its actions take, and what they do."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from lens_jax.atomic import write_json
from lens_jax.data.engine import build as building
from lens_jax.data.engine import plan, readers, removed, status, units, why
from lens_jax.data.engine import remove as removing
from lens_jax.data.engine.config import EngineConfig, plain
from lens_jax.data.engine.layout import load_layout
from lens_jax.data.engine.supervisor import Options
from lens_jax.data.engine.synthesis import UNITS, with_layout, with_synthetic
from lens_jax.data.engine.threads import cores
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
        workers = cores() if self.workers is None else self.workers
        return Options(workers, self.accept_losses, self.strict)


@dataclasses.dataclass(frozen=True)
class RunStage:
    """Run one stage, here or on one of several machines that share the work folder."""

    # Which: synthesize, probe, measure, score, embed, keep, select, caption, write.
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
    # Let Apache Beam do it (probe, measure, score, embed, keep), in this process or by the runner that is named by
    # options after --, which are all Beam's: --beam -- --runner=FlinkRunner --flink_master=HOST:PORT
    beam: bool = False
    beam_arguments: tyro.conf.Suppress[tuple[str, ...]] = ()

    def __post_init__(self):
        if self.beam and self.hosts > 1:
            raise LensError("--beam spreads the work by itself: give it no --hosts")
        if self.beam_arguments and not self.beam:
            raise LensError(
                f"options after -- are Beam's: give --beam too, or leave out {self.beam_arguments[0]!r:.80}"
            )
        at_least("--workers", self.workers, 0)
        at_least("--hosts", self.hosts, 1)
        if not 0 <= self.host < self.hosts:
            raise LensError(f"--host is {self.host}, --hosts {self.hosts}; hosts count from 0")

    def options(self) -> Options:
        workers = cores() if self.workers is None else self.workers
        return Options(workers, self.accept_losses, self.strict, self.host, self.hosts)


@dataclasses.dataclass(frozen=True)
class Caption:
    """Ask a model for captions of what was kept."""

    # The run itself.
    config: Annotated[EngineConfig, tyro.conf.arg(name="")]
    # Say what it will take and cost, and ask nothing.
    dry_run: bool = False
    # Ask again about images that the server failed at.
    retry_failed: bool = False
    # Threads that decode and encode images; by default one a core.
    workers: int | None = None
    # This machine asks about every `hosts`-th unit, from number `host` on.
    host: int = 0
    hosts: int = 1
    # Go on where a source loses more than half of its images.
    accept_losses: bool = False
    # Stop at the first image without a caption.
    strict: bool = False

    def options(self) -> Options:
        workers = cores() if self.workers is None else self.workers
        return Options(workers, self.accept_losses, self.strict, self.host, self.hosts)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Say what so many images will cost, from a timed sample of these."""

    # The run itself.
    config: Annotated[EngineConfig, tyro.conf.arg(name="")]
    # How many images are wanted in the end.
    images: float = 1e6
    # How many of the sources' are tried.
    sample: int = 200
    # Price of a core and of a GPU for an hour, and of a terabyte for a month, in any currency; 0 leaves it out.
    core_price: float = 0.0
    gpu_price: float = 0.0
    terabyte_price: float = 0.0
    # Also write the plan as JSON here.
    json: str = ""

    def __post_init__(self):
        for name, least in (("images", 1), ("sample", 1), ("core_price", 0), ("gpu_price", 0), ("terabyte_price", 0)):
            if not getattr(self, name) >= least:
                raise LensError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")


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
    beam = options.beam_arguments if options.beam else None
    building.run_one(options.config, options.stage, options.options(), options.retry_failed, beam=beam)


def run_caption(options: Caption) -> None:
    run = building.Run(options.config, options.options())
    if options.config.caption is None:
        raise LensError("the config has no `caption`: name an endpoint and a model in it")
    run.caption(run.join(), options.dry_run, options.retry_failed)


def run_plan(options: Plan) -> None:
    building.check(options.config)
    if not options.config.sources:
        raise LensError("the config has no sources: what images of text cost, `lens-jax bench synthetic` measures")
    everything = [unit for source in options.config.sources for unit in readers.units(source, options.config.unit_rows)]
    sample = plan.take_sample(options.config, everything, options.sample)
    lines = plan.cost(options.config, sample, options.images)
    prices = plan.Prices(options.core_price, options.gpu_price, options.terabyte_price)
    plan.show(sample, lines, options.images, prices)
    if options.json:
        write_json(options.json, plan.to_json(sample, lines, prices))


def run_status(options: Look) -> None:
    layout = load_layout(options.config.work)
    everything = units.read_units(options.config.work)
    of = {stage: everything for stage in layout.fingerprints if stage != "write"}
    if (layout.work / "groups.parquet").is_file():
        of["write"] = units.read_units(layout.work, "groups")
    if (layout.work / f"{UNITS}.parquet").is_file():
        layout, drawn = with_layout(options.config, layout), units.read_units(layout.work, UNITS)
        of = {"synthesize": drawn} | of
    status.show(layout, of)


def run_report(options: Look) -> None:
    layout = load_layout(options.config.work, plain(with_synthetic(options.config)))
    page = building.write_page(options.config, layout, units.read_units(options.config.work))
    building.say(f"report: {page}")


def run_why(options: Why) -> None:
    layout = load_layout(options.config.work)
    sources = {source.name: source.path for source in with_synthetic(options.config).sources}
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
    for folder in outcome.outdated:
        building.say(
            f"{folder}: made of what has changed; make it again (`prepare curated`, `precompute`), or remove it"
        )


# By name: what it takes, and what it does. All but `remove` begin with a config.
ACTIONS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "build": (Build, run_build),
    "run": (RunStage, run_stage),
    "plan": (Plan, run_plan),
    "caption": (Caption, run_caption),
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


def split(argv: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Our options, and Beam's, which come after --."""
    if "--" not in argv:
        return argv, ()
    place = argv.index("--")
    return argv[:place], tuple(argv[place + 1 :])


def with_beam(options: Any, arguments: tuple[str, ...]) -> Any:
    """Options of an action with those of Beam."""
    return dataclasses.replace(options, beam_arguments=arguments) if arguments else options
