"""`lens-jax bench engine`: the data engine's first two stages beside a plain loop over the same functions.

The loop is what a script does: a pool of processes, a tar at a time, rows sent back. The engine does the same and
keeps a table of every unit and stage, notes of attempts and signs of life, and reads each tar twice. Processor time is
compared, of this process and of the workers' units, in turn; that of Beam's workers has their start-up in it.
"""

import dataclasses
import io
import multiprocessing
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from lens_jax.bench import measure
from lens_jax.bench.data import photograph
from lens_jax.data.engine import measure as scores
from lens_jax.data.engine import units as unit_lists
from lens_jax.data.engine.config import EngineConfig, Source
from lens_jax.data.engine.decode import Limits, decode, make_quiet
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.measure import Measure
from lens_jax.data.engine.probe import Probe, probe
from lens_jax.data.engine.readers import read
from lens_jax.data.engine.run_stage import read_log, run_stage
from lens_jax.data.engine.stage import fingerprints
from lens_jax.data.engine.supervisor import Options
from lens_jax.data.engine.tables import MEASURE, PROBE
from lens_jax.data.engine.unit import Unit

# Different photographs; the others are these with other bytes behind their end.
_DIFFERENT = 64
_STAGES = {"probe": Probe(), "measure": Measure()}


@dataclasses.dataclass(frozen=True)
class EngineBench:
    """Images a processor second: probe and measure by the engine, by a plain pool of processes, and by Beam."""

    # Images, and how many of them a tar has.
    count: int = 2000
    per_tar: int = 200
    # Sides in pixels of the made images.
    side: int = 1024
    # Processes of each.
    workers: int = 2
    # What the engine is compared with, in turn; beam needs the extra of that name.
    against: tuple[Literal["loop", "beam"], ...] = ("loop",)
    # Passes over all images; the least of the processor seconds is reported.
    repeats: int = 2
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "count", "per_tar", "side", "workers", "repeats")


def bench_engine(bench: EngineBench) -> dict:
    """Make tars, run both stages over them in each way, and a second time over what is finished; the figures."""
    with tempfile.TemporaryDirectory() as folder:
        site = _Site(bench, Path(folder))
        runs: dict[str, Callable[[Path], float]] = {"engine": site.engine}
        runs |= {name: getattr(site, name) for name in bench.against}
        cpu: dict[str, float] = {}
        for repeat in range(bench.repeats):
            for name, run in runs.items():
                before = time.process_time()
                used = run(Path(folder) / f"{name}-{repeat}") + time.process_time() - before
                cpu[name] = min(used, cpu.get(name, used))
        result = {"images": bench.count, "kilobytes_an_image": site.bytes / bench.count / 1e3}
        for name, seconds in cpu.items():
            result[f"{name}_images_a_core_second"] = bench.count / seconds
        for name in bench.against:
            result[f"ratio_to_{name}"] = cpu[name] / cpu["engine"]
        result["largest_worker_megabytes"] = site.memory / 1e6
        started = time.perf_counter()
        site.engine(Path(folder) / "engine-0")
        result["finished_again_seconds"] = time.perf_counter() - started
    return measure.report(bench, result)


class _Site:
    """The tars, and each way to go through them, which returns its workers' processor seconds."""

    def __init__(self, bench: EngineBench, folder: Path):
        self._bench = bench
        self._source = Source("made", "webdataset", str(folder / "tars"))
        self.bytes = _make_tars(bench, folder / "tars")
        self.memory = 0

    def _of(self, work: Path) -> tuple[EngineConfig, Layout, list[Unit]]:
        config = EngineConfig((self._source,), work=str(work), out=str(work / "out"))
        return config, Layout(work, fingerprints(_STAGES, config)), unit_lists.find_units(config)

    def engine(self, work: Path) -> float:
        config, layout, units = self._of(work)
        used = 0.0
        for name, stage in _STAGES.items():
            run_stage(stage, config, layout, units, Options(workers=self._bench.workers), show=False)
            log = read_log(layout, name).values()
            used += sum(entry["cpu_seconds"] for entry in log)
            self.memory = max(self.memory, *(entry["memory"] for entry in log))
        return used

    def loop(self, work: Path) -> float:
        import pyarrow as pa
        import pyarrow.parquet as pq

        config, _, units = self._of(work)
        with multiprocessing.get_context("spawn").Pool(self._bench.workers, make_quiet) as pool:
            tasks = [(self._source, unit, Limits(config.max_pixels, config.max_bytes)) for unit in units]
            found = list(pool.imap(_rows, tasks))
        rows = [row for some, _ in found for row in some]
        work.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, pa.unify_schemas([PROBE, MEASURE])), work / "rows.parquet")
        return sum(seconds for _, seconds in found)

    def beam(self, work: Path) -> float:
        from lens_jax.data.engine.beam_run import run_by_beam

        config, layout, units = self._of(work)
        before = os.times()
        for stage in _STAGES.values():
            run_by_beam(stage, config, layout, units, self._bench.workers, ())
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system


def _rows(task: tuple[Source, Unit, Limits]) -> tuple[list[dict], float]:
    """All that the two stages store of the images of a tar, and the processor seconds it took."""
    started = time.process_time()
    source, unit, limits = task
    rows = []
    for index, item in enumerate(read(source, unit)):
        row = {"index": index, **probe(source, item, limits)}
        if "problem" not in row:
            row |= dataclasses.asdict(scores.measure(decode(item.data, limits)))
        rows.append(row)
    return rows, time.process_time() - started


def _make_tars(bench: EngineBench, folder: Path) -> int:
    """Tars of JPEGs with captions; the bytes of all images."""
    rng, files, total = np.random.default_rng(0), [], 0
    for _ in range(min(bench.count, _DIFFERENT)):
        buffer = io.BytesIO()
        photograph(rng, bench.side, bench.side).save(buffer, "JPEG", quality=90, subsampling=2)
        files.append(buffer.getvalue())
    folder.mkdir()
    for start in range(0, bench.count, bench.per_tar):
        with tarfile.open(folder / f"{start // bench.per_tar:06d}.tar", "w") as tar:
            for number in range(start, min(start + bench.per_tar, bench.count)):
                data = files[number % len(files)] + number.to_bytes(4, "big")
                total += len(data)
                for ending, content in (("jpg", data), ("txt", b"a photograph")):
                    entry = tarfile.TarInfo(f"{number:08d}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return total
