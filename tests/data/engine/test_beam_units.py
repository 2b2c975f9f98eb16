"""A stage spread over its units by Beam: the tables are those that our own workers make."""

import functools
import sys
from pathlib import Path

import pytest

from lens_jax.data.engine import units as unit_lists
from lens_jax.data.engine.config import EngineConfig, Source
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.run_stage import run_stage
from lens_jax.data.engine.run_unit import Runner
from lens_jax.data.engine.stage import fingerprints
from lens_jax.data.engine.supervisor import Options

sys.path.insert(0, str(Path(__file__).parent))
from fake_stages import Bytes

pytestmark = pytest.mark.beam

STAGE = Bytes()


@pytest.fixture
def config(tmp_path):
    """Thirty files in six units."""
    folder = tmp_path / "im[a]ges *? é"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:03d}.jpg").write_bytes((b"BAD" if i % 7 == 3 else b"\xff\xd8\xff") + b"image %d" % i)
    return EngineConfig(
        (Source("s", "folder", str(folder)),), work=str(tmp_path / "work"), out=str(tmp_path / "out"), unit_rows=5
    )


def run(config, work, arguments=(), workers=1):
    from lens_jax.data.engine.dedup.beam import RunUnits, beam, runner_options

    layout = Layout(work, fingerprints({"probe": STAGE}, config))
    units = unit_lists.find_units(config)
    with beam.Pipeline(options=runner_options(workers, arguments)) as pipeline:
        _ = (
            pipeline
            | beam.Create(units)
            | RunUnits(functools.partial(Runner, STAGE, config, layout))
            | beam.Map(functools.partial(_write, str(work / "totals")))
        )
    return layout, (work / "totals").read_text()


def _write(path, totals):
    Path(path).write_text(repr(sorted(totals.items())))


def files(layout):
    return {path.name: path.read_bytes() for path in layout.folder("probe").glob("*.parquet")}


@pytest.mark.parametrize("runner", ["in this process", "two processes", "dask"])
def test_the_same_tables(config, tmp_path, monkeypatch, runner):
    # Workers find `fake_stages` by this.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    own = Layout(tmp_path / "own", fingerprints({"probe": STAGE}, config))
    run_stage(STAGE, config, own, unit_lists.find_units(config), Options(workers=0), show=False)
    if runner == "dask":
        distributed = pytest.importorskip("distributed")
        with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
            arguments = (
                "--runner=apache_beam.runners.dask.dask_runner.DaskRunner",
                f"--dask_client_address={cluster.scheduler_address}",
            )
            layout, totals = run(config, tmp_path / "work", arguments)
    else:
        layout, totals = run(config, tmp_path / "work", workers=1 + (runner == "two processes"))
    assert len(files(own)) == 6
    assert files(layout) == files(own)
    assert totals == "[('corrupt data', 4), ('ok', 26), ('units', 6)]"
    assert not list(layout.folder("probe").glob("attempts/*/*"))
