"""`bench engine`: both ways go through every image, and what is finished is not run again."""

import json

import pytest

from lens_jax.bench.engine import EngineBench, bench_engine


def test_figures(tmp_path):
    path = tmp_path / "engine.json"
    found = bench_engine(EngineBench(count=20, per_tar=6, side=48, workers=1, repeats=1, json=str(path)))
    assert json.loads(path.read_text())["result"] == found
    assert found["images"] == 20
    ratio = found["engine_images_a_core_second"] / found["loop_images_a_core_second"]
    assert found["ratio_to_loop"] == pytest.approx(ratio)
    assert min(found.values()) > 0
