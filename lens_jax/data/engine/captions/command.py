"""`lens-jax data caption CONFIG`: what captions will cost, and all of them, in one process that can be killed."""

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lens_jax.atomic import check_writable, write_json
from lens_jax.console import make_console
from lens_jax.data.engine.captions import contract, sent, show
from lens_jax.data.engine.captions.alike import refuse_alike
from lens_jax.data.engine.captions.forecast import Forecast
from lens_jax.data.engine.captions.job import NOT_ANSWERED, OK, Job
from lens_jax.data.engine.captions.journal import Journal, Taken, folder_of, known_keys
from lens_jax.data.engine.captions.stage import CaptionStage, open_asker
from lens_jax.data.engine.captions.unit import UnitCaptions, kinds_of
from lens_jax.data.engine.config import EngineConfig
from lens_jax.data.engine.groups import is_captioned
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.losses import check_losses
from lens_jax.data.engine.outcomes import describe, lost
from lens_jax.data.engine.run_stage import remove_partials, stopping_at_sigterm
from lens_jax.data.engine.run_unit import memory
from lens_jax.data.engine.stage import UnitInput
from lens_jax.data.engine.tables import read_metadata, read_table, write_table
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError

_NAME = CaptionStage.name
# Seconds.
_TELL_EVERY = 0.5


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are asked for here; none of it changes a caption."""

    # Say what it will take and cost, and ask nothing.
    dry_run: bool = False
    # Ask again about images that the server failed at in an earlier run.
    retry_failed: bool = False
    # Threads that decode and encode images.
    threads: int = 2
    # Go on where more than half of a source's images get no caption.
    accept_losses: bool = False
    # Stop at the first image without a caption.
    strict: bool = False
    # Of several machines, which this is, of how many. Each keeps the limits of the endpoint by itself.
    host: int = 0
    hosts: int = 1

    def __post_init__(self):
        if self.threads < 1 or not 0 <= self.host < self.hosts:
            raise LensError(
                f"threads {self.threads} of at least 1, host {self.host} from 0 to below hosts {self.hosts}"
            )


@dataclass
class Outcome:
    """What became of all images so far, of earlier runs too."""

    counts: Counter[str]
    rejected: Counter[str]
    repaired: Counter[str]
    # Images that the first model refused, and those of them that the second captioned.
    refused: int = 0
    routed: int = 0
    # Questions that were in flight when a process was killed and were asked again: paid twice at most.
    asked_again: int = 0
    # Units that another process has, or whose images were not all through.
    taken: int = 0


def run(config: EngineConfig, options: CaptionOptions, layout: Layout, units: Sequence[Unit]) -> Outcome | Forecast:
    """Caption the kept images of those of `units` that are this machine's and have no table yet.

    Stopped, killed, or out of money, the same call goes on and pays for nothing twice but what was in flight. With
    `options.dry_run` only the forecast, printed too. LensError where no question can succeed: a key refused, the budget
    spent, a server that is gone.
    """
    if config.caption is None:
        raise LensError(
            "the config has no `caption`: name an endpoint and a model in it, or keep the sources' captions"
        )
    everything = [unit for unit in units if is_captioned(config, unit.source)]
    mine = [unit for unit in units[options.host :: options.hosts] if is_captioned(config, unit.source)]
    if options.dry_run:
        return _say_forecast(config, layout, mine)
    check_writable(layout.folder(_NAME))
    check_writable(folder_of(config.work))
    remove_partials(layout.folder(_NAME))
    if options.retry_failed:
        _forget_failures(layout, mine)
    finished = layout.finished(_NAME)
    missing = [unit for unit in mine if unit.id not in finished]
    taken = _ask(config, options, layout, missing) if missing else 0
    outcome = _sum(layout, mine, taken)
    # Whoever ends the last unit looks at all of them, of other machines too.
    if not {unit.id for unit in everything} - layout.finished(_NAME):
        most = config.caption.most_alike
        if alike := refuse_alike([layout.table(_NAME, unit.id) for unit in everything], most):
            make_console().print(f"{alike:,} captions are the same as more than {most} others")
            outcome = _sum(layout, mine, taken)
    show.outcome(outcome)
    return outcome


def _ask(config: EngineConfig, options: CaptionOptions, layout: Layout, missing: Sequence[Unit]) -> int:
    """Ask about units until each has a table; how many another process has."""
    total = sum(_images(layout, unit) for unit in missing)
    journal, asker = open_asker(config, options.threads)
    try:
        asker.check()
        with stopping_at_sigterm(), show.progress(total) as bar:
            work = _Work(
                config, options, layout, journal, lambda counts: bar.update(counts, asker.clients), len(missing)
            )
            asker.run(work.open(missing), work.done, work.beat)
    finally:
        asker.close()
        journal.close()
        with contextlib.suppress(OSError):
            _running(layout).unlink(missing_ok=True)
    for source, counts in work.counts().items():
        _check(source, counts, options, at_end=True)
    return work.taken


class _Work:
    """The units that are asked about, and those that are done."""

    def __init__(self, config, options: CaptionOptions, layout: Layout, journal: Journal, tell, units: int):
        self._config, self._options, self._layout, self._journal = config, options, layout, journal
        self._tell, self._units = tell, units
        self._open: dict[str, UnitCaptions] = {}
        self._by_source: dict[str, Counter[str]] = {}
        self._finished = self.taken = 0
        self._started = self._wall = time.monotonic()
        self._cpu, self._told = time.process_time(), 0.0

    def open(self, units: Sequence[Unit]) -> Iterator[UnitCaptions]:
        """One after the other, as they are taken, but for those that another process has."""
        for unit in units:
            try:
                answers = self._journal.open(unit.id)
            except Taken:
                self.taken += 1
                continue
            self._open[unit.id] = UnitCaptions(self._config.caption, _input(self._config, self._layout, unit), answers)
            yield self._open[unit.id]

    def done(self, unit: UnitCaptions) -> None:
        """Write the table, then end the journal: killed in between, the next run makes the table of it again."""
        table = unit.table()
        write_table(self._layout.table(_NAME, unit.name), table, unit.metadata())
        self._journal.finish(unit.name)
        self._open.pop(unit.name, None)
        self._by_source.setdefault(unit.given.source.name, Counter()).update(unit.counts)
        self._finished += 1
        wall, cpu = time.monotonic(), time.process_time()
        line = {
            "unit": unit.name, "source": unit.given.source.name, "counts": dict(unit.counts),
            "seconds": wall - self._wall, "cpu_seconds": cpu - self._cpu, "memory": memory(), "culprits": [],
            "time": time.time(),
        }  # fmt: skip
        self._wall, self._cpu = wall, cpu
        log = self._layout.logs(_NAME) / f"{_process()}.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def beat(self) -> None:
        """A sign of life now and then; LensError where a source loses most of its images."""
        now = time.monotonic()
        if now - self._told < _TELL_EVERY:
            return
        self._told = now
        by_source = self.counts()
        for source, counts in by_source.items():
            _check(source, counts, self._options, at_end=False)
        counts = sum(by_source.values(), Counter())
        self._tell(counts)
        path, rate = _running(self._layout), sum(counts.values()) / max(now - self._started, 1e-9)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, show.sign_of_life(_NAME, self._options, self._units, self._finished, rate, self._open))

    def counts(self) -> dict[str, Counter[str]]:
        """Images of this run by source and by what became of them, those of open units too."""
        found = {source: Counter(counts) for source, counts in self._by_source.items()}
        for unit in self._open.values():
            found.setdefault(unit.given.source.name, Counter()).update(unit.counts)
        return found


def _check(source: str, counts: Counter[str], options: CaptionOptions, at_end: bool) -> None:
    """LensError where more than half of a source's images get no caption, or, if `options.strict`, any of them."""
    if options.strict and lost(counts):
        raise LensError(f"source {source}, stage {_NAME}: {describe(counts)}, and --strict; what was answered is kept")
    check_losses(_NAME, source, counts, options, at_end)


def _process() -> str:
    return f"{os.uname().nodename}-{os.getpid()}"


def _running(layout: Layout):
    return layout.running / f"{_process()}.json"


def _input(config: EngineConfig, layout: Layout, unit: Unit) -> UnitInput:
    tables = {}
    for stage in CaptionStage.reads:
        path = layout.table(stage, unit.id)
        if not path.exists():
            raise LensError(f"{unit.path}: stage caption reads stage {stage}, which has not been run: {path}")
        tables[stage] = read_table(path)
    return UnitInput(unit, config.source(unit.source), tables)


def _images(layout: Layout, unit: Unit) -> int:
    """Kept images of a unit; 0 where nothing was selected yet, which is said when its turn comes."""
    path = layout.table("select", unit.id)
    return sum(read_table(path, ["kept"])["kept"].to_pylist()) if path.exists() else 0


def _forget_failures(layout: Layout, units: Sequence[Unit]) -> None:
    """Remove tables with images that the server failed at. All that was answered is kept."""
    finished = layout.finished(_NAME)
    for unit in units:
        if unit.id in finished:
            path = layout.table(_NAME, unit.id)
            if json.loads(read_metadata(path).get("counts", "{}")).get(NOT_ANSWERED):
                path.unlink(missing_ok=True)


def _sum(layout: Layout, units: Sequence[Unit], taken: int) -> Outcome:
    total = Outcome(Counter({OK: 0}), Counter(), Counter(), taken=taken)
    finished = layout.finished(_NAME)
    for unit in units:
        if unit.id not in finished:
            continue
        noted = {name: json.loads(value) for name, value in read_metadata(layout.table(_NAME, unit.id)).items()
                 if name in ("counts", "rejected", "repaired", "refused", "routed", "asked_again")}  # fmt: skip
        total.counts.update(noted.get("counts", {}))
        total.rejected.update(noted.get("rejected", {}))
        total.repaired.update(noted.get("repaired", {}))
        total = replace(
            total,
            refused=total.refused + noted.get("refused", 0),
            routed=total.routed + noted.get("routed", 0),
            asked_again=total.asked_again + noted.get("asked_again", 0),
        )
    return total


def _say_forecast(config: EngineConfig, layout: Layout, units: Sequence[Unit]) -> Forecast:
    """Of the images that have no caption and no answer yet."""
    caption, finished = config.caption, layout.finished(_NAME)
    total, by_source = Forecast(), {}
    for unit in units:
        if unit.id in finished:
            continue
        given = _input(config, layout, unit)
        known = known_keys(folder_of(config.work), unit.id)
        kinds = kinds_of(caption, given.source)
        probe = given.tables["probe"].select(["index", "id", "sha256", "height", "width"]).to_pylist()
        for row, kept in zip(probe, given.tables["select"]["kept"].to_pylist()):
            if not kept:
                continue
            tasks = contract.tasks(caption, kinds, row["id"])
            if known:
                job = Job(caption, unit.id, row["index"], row["id"], row["sha256"], tasks)
                first = job.request(sent.named(caption, row["sha256"]))
                if first.key(caption.endpoint.model, caption.endpoint.extra()) in known:
                    continue
            for sums in (total, by_source.setdefault(given.source.name, Forecast())):
                sums.add(caption, tasks, row["height"], row["width"])
    show.forecast(caption, total, by_source)
    return total
