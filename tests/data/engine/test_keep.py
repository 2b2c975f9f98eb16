"""The stage `keep`: from the tables of other stages to what each duplicate names."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lens_jax.data.engine.config import Dedup, EngineConfig, Models, Source
from lens_jax.data.engine.dedup.embedded import Embedded
from lens_jax.data.engine.dedup.keep import Keep, find_duplicates
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.run_unit import Runner
from lens_jax.data.engine.tables import EMBED, KEEP, PROBE, SCORE, VECTOR, image_id, read_table, write_table
from lens_jax.data.engine.unit import make_unit
from lens_jax.errors import LensError

# (unit, name, file, aesthetic, side, angle in degrees or None): duplicates are up to 9.9 degrees apart.
IMAGES = (
    (0, "best", "A", 6.0, 500, 0),
    (0, "copy", "A", 6.0, 400, 0),  # the same file; smaller, which no file is, but the order has to decide by something
    (0, "near", "B", 5.0, 500, 5),
    (1, "copy of near", "B", 4.9, 500, 5),
    (1, "end of the chain", "C", 4.8, 500, 12),  # a duplicate of near, which is dropped
    (1, "unsafe", "D", 9.0, 900, 90),  # dropped by another step: displaces nothing
    (1, "beside unsafe", "E", 1.0, 500, 91),
    (1, "no vector", "F", 3.0, 500, None),
    (1, "no score", "G", None, 500, 120),
    (1, "scored beside it", "H", 0.5, 300, 121),
)
SURVIVE = lambda config, source, tables: np.array([key != "unsafe" for key in tables["probe"]["key"].to_pylist()])


@pytest.fixture
def config(tmp_path):
    source = Source("s", "folder", str(tmp_path))
    models = Models(embedding="layout")
    return EngineConfig((source,), work=str(tmp_path / "work"), out=str(tmp_path / "out"), models=models)


def written(config, images, width=4, embed=True):
    """A layout with the tables of other stages, and the units."""
    names = ("probe", "measure", "score", "embed", "keep")
    layout = Layout(Path(config.work), dict.fromkeys(names, "f" * 16))
    units = tuple(make_unit("s", "x", part, 2) for part in range(2))
    for part, unit in enumerate(units):
        rows = [row for row in images if row[0] == part]
        ids = [image_id("s", name) for _, name, *_ in rows]
        probe = [
            {"id": id, "index": i, "key": row[1], "sha256": row[2].encode() * 32, "width": row[4], "height": row[4]}
            for i, (id, row) in enumerate(zip(ids, rows))
        ]
        score = [{"id": id, "aesthetic": row[3]} for id, row in zip(ids, rows)]
        vectors = [None if row[5] is None else _at(row[5], width) for row in rows]
        write_table(layout.table("probe", unit.id), pa.Table.from_pylist(probe, PROBE))
        write_table(layout.table("measure", unit.id), pa.table({"id": pa.array(ids, pa.binary(16))}))
        write_table(layout.table("score", unit.id), pa.Table.from_pylist(score, SCORE))
        if embed:
            table = pa.table([pa.array(ids, pa.binary(16)), pa.array(vectors, VECTOR)], schema=EMBED)
            write_table(layout.table("embed", unit.id), table)
    return layout, units


def _at(angle, width):
    turned = np.radians(angle)
    return np.array([np.cos(turned), np.sin(turned), *[0] * (width - 2)], np.float16)


def keep(config, layout, units):
    """By name: (the name it is a duplicate of, cosine, size of its component)."""
    outcome = find_duplicates(config, layout, units, SURVIVE, Embedded())
    run = Runner(Keep(SURVIVE, layout.folder("keep")), config, layout)
    names = {image_id("s", name): name for _, name, *_ in IMAGES}
    found = {}
    for unit in units:
        run(unit)
        table = read_table(layout.table("keep", unit.id))
        assert table.schema.remove_metadata().equals(KEEP)
        for row in table.to_pylist():
            found[names[row["id"]]] = (names.get(row["duplicate_of"]), row["cosine"], row["component"])
    return outcome, found


def test_what_each_names(config):
    outcome, found = keep(config, *written(config, IMAGES))
    cosine = lambda angle: pytest.approx(np.cos(np.radians(angle)), abs=1e-3)
    assert found == {
        "best": (None, None, 5),
        "copy": ("best", 1.0, 5),
        "near": ("best", cosine(5), 5),
        "copy of near": ("best", cosine(5), 5),
        "end of the chain": (None, None, 5),
        "unsafe": (None, None, None),
        "beside unsafe": (None, None, 1),
        "no vector": (None, None, 1),
        "no score": ("scored beside it", cosine(1), 2),
        "scored beside it": (None, None, 2),
    }
    assert (outcome.rows, outcome.vectors, outcome.exact, outcome.near) == (9, 8, 2, 2)


def test_another_order(tmp_path, config):
    config = dataclasses.replace(config, dedup=Dedup(priority=("area", "id")))
    _, found = keep(config, *written(config, IMAGES))
    assert found["scored beside it"][0] == "no score"


def test_without_an_embedding_exact_duplicates_alone(config):
    config = dataclasses.replace(config, models=Models())
    outcome, found = keep(config, *written(config, IMAGES, embed=False))
    assert {name for name, (other, _, _) in found.items() if other} == {"copy", "copy of near"}
    assert (outcome.exact, outcome.near, outcome.cells) == (2, 0, 0)


def test_tables_that_do_not_belong_together(config):
    layout, units = written(config, IMAGES)
    write_table(layout.table("score", units[0].id), pa.Table.from_pylist([], SCORE))
    with pytest.raises(LensError, match="not the same number of rows"):
        find_duplicates(config, layout, units, SURVIVE, Embedded())
