"""The search for duplicates by Beam: the same pairs and the same kept rows as without it, on three runners.

Beam wants older packages than the rest of us, so it has an environment of its own; CONTRIBUTING says how it is made.
"""

import dataclasses

import numpy as np
import pytest

from lens_jax.bench import vectors as made
from lens_jax.data.engine.dedup import priority, resolve, run
from lens_jax.data.engine.dedup.embedded import Embedded
from lens_jax.data.engine.dedup.found import read_found
from lens_jax.data.engine.dedup.rows import load_arrays

pytestmark = pytest.mark.beam

COUNT, DIM = 1200, 32


@pytest.fixture(scope="module")
def beam():
    from lens_jax.data.engine.dedup import beam

    return beam


@pytest.fixture(scope="module")
def dask_workers():
    """The address of a scheduler with two worker processes."""
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    yield cluster.scheduler_address
    cluster.close()


@pytest.fixture(scope="module")
def rows():
    """Clusters with duplicates, 120 copies of one image, files that are there several times, and rows whose lists
    decide nothing once they are cut off after 4 (see test_dedup.py)."""
    draw = np.random.default_rng(5)
    vectors = made.clustered(COUNT, DIM)
    copies = made.beside(np.tile(np.eye(1, DIM), (120, 1)), np.full(120, 0.999), draw)
    vectors[:120] = copies.astype(np.float16)
    names = made.keys(COUNT)
    sha = priority.as_keys(np.concatenate([priority.as_bytes(names)] * 2, 1))
    angles = np.radians([0, 7, 7.1, 7.2, 7.3, 12, 16])
    those = 120 + np.argsort(names[120:127])
    vectors[those] = 0
    vectors[those, 1], vectors[those, 2] = np.cos(angles), np.sin(angles)
    again = 200 + draw.choice(COUNT - 200, 150, replace=False)
    sha[again], vectors[again] = sha[again[0]], vectors[again[0]]
    sha[again[75:]], vectors[again[75:]] = sha[200], vectors[200]
    return names, vectors, sha


def find(folder, rows, search, units=6, **options):
    names, vectors, sha = rows
    task = made.make_task(folder / "work", made.store(folder / "rows", vectors, names, sha), units, **options)
    outcome = run.find(task, search, True, 0, 200, 0)
    pairs, _ = read_found(sorted((task.folder / "pairs").glob("*/*.parquet")), made.WIDTH)
    return outcome, pairs, task.firsts(), load_arrays(task.folder / "resolved", resolve.Resolved)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, rows):
    """What is found without Beam: with lists so short that some are made longer."""
    found = find(tmp_path_factory.mktemp("embedded"), rows, Embedded(), limit=4)
    assert found[0].exact > 100
    assert found[0].near > 100
    assert found[0].starved > 0
    return found


def same(found, other):
    assert found[0] == other[0]
    for arrays, others in zip(found[1:], other[1:]):
        assert all(np.array_equal(a, b) for a, b in zip(arrays, others))


@pytest.mark.parametrize("workers", [1, 2])
def test_beams_own_runner(tmp_path, beam, rows, embedded, workers):
    same(find(tmp_path, rows, beam.BeamSearch(workers=workers, parts=5), limit=4), embedded)


def test_dask_with_two_workers(tmp_path, beam, rows, embedded, dask_workers):
    arguments = ("--runner=apache_beam.runners.dask.dask_runner.DaskRunner", f"--dask_client_address={dask_workers}")
    same(find(tmp_path, rows, beam.BeamSearch(arguments, parts=5), units=9, limit=4), embedded)


def test_nothing_to_compare(tmp_path, beam):
    rows = made.keys(3), np.zeros((3, 8), np.float16), priority.as_keys(np.arange(96, dtype=np.uint8).reshape(3, 32))
    outcome, pairs, firsts, _ = find(tmp_path, rows, beam.BeamSearch(parts=2))
    assert dataclasses.astuple(outcome) == (3, 0, 0, 0, 0, 0, 0)
    assert not len(pairs.first)
    assert not len(firsts.key)
