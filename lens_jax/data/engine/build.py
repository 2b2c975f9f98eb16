"""A run from its sources to its data sets: `lens-jax data build`, and one stage of it: `lens-jax data run`.

What is there is not made again, so the same command goes on where it was stopped or killed, and a new threshold
computes only what depends on it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from lens_jax import __version__
from lens_jax.atomic import check_writable
from lens_jax.console import make_console
from lens_jax.data.buckets import parse_buckets
from lens_jax.data.engine import groups, manifest, removed, units
from lens_jax.data.engine.beam_run import run_by_beam
from lens_jax.data.engine.captions import command as captions
from lens_jax.data.engine.claim import claim
from lens_jax.data.engine.config import EngineConfig, plain
from lens_jax.data.engine.dedup.embedded import Embedded
from lens_jax.data.engine.dedup.keep import Keep, find_duplicates
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.report.page import write_report
from lens_jax.data.engine.run_stage import forget_failures, retry_failed, run_stage
from lens_jax.data.engine.select import survivors
from lens_jax.data.engine.stage import fingerprints
from lens_jax.data.engine.stages import MAPS, make_stages
from lens_jax.data.engine.supervisor import Options, Progress
from lens_jax.data.engine.synthesis import synthesize, with_synthetic
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError, nearest


class Run:
    """A run at its present settings."""

    def __init__(self, config: EngineConfig, options: Options, show: bool = True, beam: tuple[str, ...] | None = None):
        """`beam` are the arguments of a runner of Beam that does the work in place of this machine's workers."""
        config = with_synthetic(config)
        check(config)
        self.beam = beam
        self.config, self.options, self.show = config, options, show
        self.taken_down = removed.read(Path(config.out))
        self.stages = make_stages(config, self.taken_down)
        # Looks at the folders of networks, before hours may pass with the sources.
        self.layout = Layout(Path(config.work), fingerprints(self.stages, config))
        self.units = units.find_units(config)
        self._name(self.whole())

    def _name(self, whole: Sequence[Unit]) -> None:
        """Name the results of the stages from `keep` on by the units that they are about, and note all names."""
        over = {"keep": units.digest(self.config.work, whole)}
        self.layout = Layout(Path(self.config.work), fingerprints(self.stages, self.config, over))
        self.layout.save(plain(self.config))

    def whole(self, names: Sequence[str] = MAPS) -> list[Unit]:
        """The units that all of these stages have a table of."""
        finished = [self.layout.finished(name) for name in names if name in self.stages]
        return [unit for unit in self.units if all(unit.id in ids for ids in finished)]

    def map(self, name: str, of: Sequence[Unit]) -> Progress:
        """Run a stage on units."""
        if self.beam is not None and name in MAPS:
            run_by_beam(self.stages[name], self.config, self.layout, of, max(self.options.workers, 1), self.beam)
        limit = getattr(self.stages[name], "processes", None)
        most = limit(self.config) if limit else None
        workers = self.options.workers if most is None else min(self.options.workers, most)
        options = dataclasses.replace(self.options, workers=workers)
        return run_stage(self.stages[name], self.config, self.layout, of, options, self.show)

    def join(self) -> list[Unit]:
        """The units that the stages from `keep` on are about, and whose results are named by them. LensError where the
        stages before have not been run on some, unless losses are accepted."""
        whole = self.whole()
        if len(whole) < len(self.units) and not self.options.accept_losses:
            there = set(whole)
            gone = next(unit for unit in self.units if unit not in there)
            lacking = next(n for n in MAPS if n in self.stages and gone.id not in self.layout.finished(n))
            raise LensError(
                f"{len(self.units) - len(whole):,} of {len(self.units):,} units are not through all stages, the first "
                f"{gone.id} ({gone.path}): `lens-jax data run CONFIG {lacking}` runs what is missing, --accept-losses "
                "goes on without them"
            )
        self._name(whole)
        return whole

    def keep(self, whole: Sequence[Unit]) -> Progress:
        """Step 9: look through all units, then make their tables."""
        search = Embedded(max(self.options.workers, 1), self.show)
        if self.beam is not None:
            from lens_jax.data.engine.dedup.beam import BeamSearch

            search = BeamSearch(self.beam, max(self.options.workers, 1))
        find_duplicates(self.config, self.layout, tuple(whole), survivors, search)
        self.stages["keep"] = Keep(survivors, self.layout.folder("keep"))
        return self.map("keep", whole)

    def caption(self, whole: Sequence[Unit], dry_run: bool = False, retry: bool = False) -> None:
        """Ask for captions of what was kept; `dry_run` says what that will cost and asks nothing."""
        at = self.options
        options = captions.CaptionOptions(
            dry_run, retry, max(at.workers, 1), at.accept_losses, at.strict, at.host, at.hosts
        )
        captions.run(self.config, options, self.layout, whole)

    def write(self, whole: Sequence[Unit], overwrite: bool = False, verify: bool = False) -> Path:
        """Write the data sets, those whose shards are all there already excepted; the path of their mixture."""
        found = groups.find_groups(self.config, self.layout, whole)
        named = [(group.unit, " ".join(unit.id for unit in group.members)) for group in found]
        units.save_units(Path(self.config.work) / "groups.parquet", named)
        self.stages["write"] = dataclasses.replace(self.stages["write"], members=groups.by_unit(found), verify=verify)
        of = {source.name: [g for g in found if g.unit.source == source.name] for source in self.config.sources}
        wanted = {
            source.name
            for source in self.config.sources
            if of[source.name] and claim(self.config, source, of[source.name], self.layout, overwrite)
        }
        at = self.options
        # Shares are of all groups: another machine may have seen a data set end in between.
        mine = [group.unit for group in found[at.host :: at.hosts] if group.unit.source in wanted]
        alone = dataclasses.replace(at, host=0, hosts=1)
        run_stage(self.stages["write"], self.config, self.layout, mine, alone, self.show)
        if at.hosts > 1 and {g.unit.id for name in wanted for g in of[name]} - self.layout.finished("write"):
            return Path(self.config.out)  # the last machine to come here ends it
        indexes = {
            source.name: manifest.finish(self.config, source, of[source.name], self.layout)
            for source in self.config.sources
            if of[source.name]
        }
        return manifest.write_mixture(self.config, indexes)


def write_page(
    config: EngineConfig, layout: Layout, everything: Sequence[Unit], anew: bool = True, show: bool = True
) -> Path:
    """Write the report page of what there is; without `anew` only where there is none of it."""
    config = with_synthetic(config)
    path = Path(config.out) / "report.html"
    done = {name: len(layout.finished(name)) for name in layout.fingerprints}
    text = json.dumps([dict(layout.fingerprints), done, __version__, plain(config)], default=str)
    mark = f"<!-- {hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()} -->"
    if anew or not _begins(path, mark):
        write_report(config, layout, everything, list(layout.fingerprints), path, mark, show)
    return path


def build(
    config: EngineConfig,
    options: Options,
    retry: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    show: bool = True,
) -> Path:
    """All stages on this machine; the path of the report page. `overwrite` replaces data sets of other settings."""
    if config.synthetic.count:
        synthesize(config, options, show)
    run = Run(config, options, show)
    if retry:
        again = retry_failed(run.layout, [name for name in run.stages if name in MAPS], run.units)
        say(f"{again:,} units are tried again", show)
    for name in MAPS:
        if name in run.stages:
            run.map(name, run.units)
    whole = run.join()
    for name in run.stages if retry else ():
        forget_failures(run.layout, name)
    run.keep(whole)
    run.map("select", whole)
    if "caption" in run.stages:
        run.caption(whole, retry=retry)
    mixture = run.write(whole, overwrite, verify)
    say(f"data sets: {mixture}", show)
    return write_page(config, run.layout, run.units, False, show)


def run_one(
    config: EngineConfig,
    stage: str,
    options: Options,
    retry: bool = False,
    show: bool = True,
    beam: tuple[str, ...] | None = None,
) -> None:
    """One stage on this machine's share of the units, or by Beam. Those before it must have been run on them."""
    if beam is not None and stage not in (*MAPS, "keep"):
        raise LensError(f"stage {stage} is not for Beam; those that are: {', '.join((*MAPS, 'keep'))}")
    if stage == "synthesize" and config.synthetic.count:
        synthesize(config, options, show)
        return
    run = Run(config, options, show, beam)
    if stage not in run.stages:
        raise LensError(
            f"no stage {stage!r:.80} in this run{nearest(stage, run.stages)}; it has: {', '.join(run.stages)}"
        )
    if retry:
        retry_failed(run.layout, [name for name in run.stages if name in MAPS], run.units)
    if stage in MAPS:
        run.map(stage, run.units)
        return
    whole = run.join()
    if retry:
        forget_failures(run.layout, stage)
    if stage == "keep":
        if options.hosts > 1:
            raise LensError("stage keep searches all units together: run it on one machine, without --hosts")
        run.keep(whole)
    elif stage == "caption":
        run.caption(whole, retry=retry)
    elif stage == "write":
        run.write(whole)
    else:
        run.map(stage, whole)


def check(config: EngineConfig) -> None:
    """What would only be found after hours: folders that cannot be written, that lie in what is read, buckets, and
    caption models without an address or a key."""
    parse_buckets(config.buckets)
    for endpoint in filter(None, (config.caption.endpoint, config.caption.second) if config.caption else ()):
        endpoint.require("the caption model")
        endpoint.key()
    for name in ("work", "out"):
        check_writable(getattr(config, name))
        place = Path(getattr(config, name)).resolve()
        for source in config.sources:
            if source.kind in ("folder", "imagefolder") and place.is_relative_to(Path(source.path).resolve()):
                raise LensError(f"{name} {place}: lies in what source {source.name} reads; choose another folder")


def _begins(path: Path, mark: str) -> bool:
    """Whether a file's first line is the mark."""
    if not path.is_file():
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline().strip() == mark


def say(text: str, show: bool = True) -> None:
    """A line on standard output."""
    if show:
        make_console().print(text)
