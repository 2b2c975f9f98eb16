"""`lens-jax data status`: how far a run is, who is at work, and what has gone wrong, from its files alone."""

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from lens_jax.console import make_console
from lens_jax.data.engine import attempts
from lens_jax.data.engine.layout import Layout, names
from lens_jax.data.engine.outcomes import OK, describe
from lens_jax.data.engine.run_stage import read_log
from lens_jax.data.engine.unit import Unit

# A process that has said nothing for so long, of the two seconds it says something in, is taken for dead.
_SILENT = 60.0


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is."""

    stage: str
    units: int
    done: int
    # Units that are not tried again, and why; units that ended a worker and have no table yet, and how often they did.
    failed: Mapping[str, str]
    tried: Mapping[str, int]
    # Images by source and reason, of units that were run here and noted.
    counts: Mapping[str, Mapping[str, int]]
    images: int
    cpu_seconds: float


def stage_status(layout: Layout, stage: str, units: Sequence[Unit]) -> StageStatus:
    """How far a stage is on `units`."""
    known = {unit.id: unit for unit in units}
    finished = layout.finished(stage) & known.keys()
    counts: dict[str, Counter[str]] = {}
    images, cpu = 0, 0.0
    for name, entry in read_log(layout, stage).items():
        if name in finished:
            counts.setdefault(known[name].source, Counter()).update(entry["counts"])
            images += sum(entry["counts"].values())
            cpu += entry["cpu_seconds"]
    folder = layout.folder(stage) / "attempts"
    tried = {}
    with contextlib.suppress(FileNotFoundError):
        tried = {name: attempts.count(folder / name) for name in sorted(os.listdir(folder)) if name in known}
    failed = {name: why for name, why in layout.given_up(stage).items() if name in known}
    tried = {name: number for name, number in tried.items() if number > 1 and name not in finished}
    return StageStatus(stage, len(units), len(finished), failed, tried, counts, images, cpu)


def running(work: Path) -> list[dict]:
    """What each process of the engine last said, the newest first; `silent` is for how many seconds it has not."""
    found = []
    for name in names(work / "running"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads((work / "running" / name).read_text())
            said["silent"] = max(time.time() - said["time"], 0.0)
            found.append(said)
    return sorted(found, key=lambda said: said["silent"])


def show(layout: Layout, stages: Mapping[str, Sequence[Unit]]) -> None:
    """Print how far each stage is."""
    console = make_console()
    table = Table("stage", "units", "failed", "images", "a CPU-s", "lost", box=box.SIMPLE)
    troubles = []
    for stage, units in stages.items():
        status = stage_status(layout, stage, units)
        lost: Counter[str] = Counter()
        for counts in status.counts.values():
            lost.update(counts)
        speed = f"{status.images / status.cpu_seconds:,.1f}" if status.cpu_seconds > 0 else ""
        values = (
            stage, f"{status.done:,} of {status.units:,}", f"{len(status.failed):,}" if status.failed else "",
            f"{lost[OK]:,}" if status.images else "", speed, describe(lost),
        )  # fmt: skip
        table.add_row(*map(Text, values))
        troubles += [f"{stage} {unit}: failed: {why}" for unit, why in status.failed.items()]
        troubles += [f"{stage} {unit}: {number} attempts so far" for unit, number in status.tried.items()]
    console.print(table)
    for said in running(layout.work):
        where = f"{said['machine']} process {said['process']}"
        if said["hosts"] > 1:
            where += f" (host {said['host']} of {said['hosts']})"
        if said["silent"] > _SILENT:
            console.print(f"{where}: stage {said['stage']}, silent for {said['silent']:,.0f} s: taken for dead")
            continue
        rate = f"{said['images_per_second']:,.1f} images a second"
        console.print(f"{where}: stage {said['stage']}, {said['done']:,} of {said['units']:,} units, {rate}")
        for unit, images, seconds, slow in said["working"]:
            console.print(f"  {unit}: {images:,} images in {seconds:,.0f} s{' (slow)' if slow else ''}")
    for trouble in troubles[:50]:
        console.print(trouble)
    if len(troubles) > 50:
        console.print(f"... and {len(troubles) - 50:,} more units in trouble")
