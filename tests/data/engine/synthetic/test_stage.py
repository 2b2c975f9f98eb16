"""The stage `synthesize`: units, its table, and what the engine reads of it."""

import dataclasses
import json

import pyarrow.parquet as pq
import pytest

from lens_jax.data.engine.build import build
from lens_jax.data.engine.config import EngineConfig, Source, Synthetic
from lens_jax.data.engine.stage import UnitInput
from lens_jax.data.engine.supervisor import Options
from lens_jax.data.engine.synthetic.draw import SOURCE, synthesize
from lens_jax.data.engine.synthetic.materials import load_materials, shapes
from lens_jax.data.engine.synthetic.stage import META, TABLE, Synthesize, numbers, records, source, units
from lens_jax.data.engine.tables import write_table
from lens_jax.data.index import load_index


@pytest.fixture
def config(latin) -> EngineConfig:
    given = Synthetic(count=7, fonts=latin, size=128)
    return EngineConfig(
        sources=(Source("none", "folder", "."),), synthetic=given, buckets=("128x128", "512x512"), unit_rows=3
    )


def with_(config: EngineConfig, **changed) -> EngineConfig:
    return dataclasses.replace(config, synthetic=dataclasses.replace(config.synthetic, **changed))


def test_units_are_all_numbers_once_and_more_images_make_none_again(config):
    found = units(config)
    assert [list(numbers(unit, 7)) for unit in found] == [[0, 1, 2], [3, 4, 5], [6]]
    longer = units(with_(config, count=100_000))
    assert [unit.id for unit in longer[:2]] == [unit.id for unit in found[:2]]
    assert longer[2].id != found[2].id
    assert len({unit.id for unit in longer}) == len(longer) == 33_334
    assert units(with_(config, count=0)) == []


def test_a_table_is_the_records_of_its_numbers(config, tmp_path):
    draw = Synthesize().open(config)
    unit = units(config)[1]
    table = draw(UnitInput(unit, source(tmp_path), {}))
    assert table.schema == TABLE
    assert draw(UnitInput(unit, source(tmp_path), {})).equals(table)
    loaded = load_materials(config)
    for index, record in zip(numbers(unit, 7), records(table)):
        made = synthesize(0, index, loaded)
        assert (record.image, record.captions, record.height) == (made.image, made.captions, made.height)
        assert record.meta["text"] == made.meta["text"]
        assert record.meta["key"] == f"{index:012d}"
    write_table(tmp_path / "a.parquet", table)
    assert pq.read_table(tmp_path / "a.parquet").equals(table)


def test_settings_are_all_that_images_follow_from(config, latin, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n")
    stage = Synthesize()
    settings = lambda config: json.dumps(stage.settings(config), sort_keys=True)
    before = settings(with_(config, texts=(str(lines),)))
    assert settings(with_(config, texts=(str(lines),), count=9)) == before
    assert settings(dataclasses.replace(with_(config, texts=(str(lines),)), work="elsewhere")) == before
    lines.write_text("two\n")
    others = [with_(config, texts=(str(lines),)), with_(config, seed=1), with_(config, fonts=latin[:1])]
    others += [with_(config, style="plain"), with_(config, locales=("de",)), with_(config, size=512), config]
    assert len({before, *map(settings, others)}) == 1 + len(others)


def test_shapes_are_the_buckets_of_the_area(config):
    from lens_jax.data.buckets import LENS_1024, LENS_PRETRAINING

    assert shapes(1024, LENS_PRETRAINING) == LENS_1024
    assert [str(shape) for shape in shapes(300, LENS_PRETRAINING)] == ["300x300"]


def test_a_build_packs_them_with_what_is_written_on_them(config, tmp_path):
    """From a config without any other source to a data set; more images leave those that are there as they were."""

    def packed(count):
        given = dataclasses.replace(
            with_(config, count=count),
            sources=(),
            work=str(tmp_path / "work"),
            out=str(tmp_path / "out"),
            validation=0.0,
        )
        build(given, Options(workers=0), overwrite=True, show=False)
        return list(load_index(tmp_path / "out" / SOURCE).records("train"))

    few, loaded = packed(4), load_materials(config)
    made = {record.captions["en"]: record for record in (synthesize(0, index, loaded) for index in range(7))}
    assert len(few) == 4
    for record in few:
        drawn = made[record.captions["en"]]
        for name in META[:-1]:
            assert record.meta[name] == drawn.meta[name]
        assert (record.height, record.width, record.licence) == (128, 128, "generated")
    (full, _) = units(with_(config, count=4))
    (table,) = (tmp_path / "work" / "synthesize").rglob(f"{full.id}.parquet")
    before = table.stat().st_mtime_ns
    assert {record.captions["en"] for record in packed(7)} == set(made)
    assert table.stat().st_mtime_ns == before
