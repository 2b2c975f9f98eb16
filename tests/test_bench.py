"""The benchmarks run and report what they promise. No speed is judged here."""

import json

import pytest

from lens_jax.bench import DenoiserBench, TrainBench, bench_denoiser, bench_train
from lens_jax.errors import LensError


def test_denoiser(tmp_path):
    path = tmp_path / "result.json"
    bench = DenoiserBench(height=64, width=32, text_tokens=4, dtype="float32", repeats=1, json=str(path))
    result = bench_denoiser(bench)
    assert json.loads(path.read_text()) == result
    assert (result["image_tokens"], result["text_tokens"]) == (8, 4)
    assert result["tflops_per_second"] == pytest.approx(result["operations"] / result["seconds"] / 1e12)
    assert "share_of_peak" not in result  # a CPU has no listed peak


def test_full_size_compiles_without_memory_for_weights():
    result = bench_denoiser(DenoiserBench(size="lens", height=1024, width=1024, compile_only=True))
    assert "4,104,225,152" in result["config"]
    assert result["operations"] == 16_752_803_315_712
    assert "seconds" not in result


def test_train(tiny_config, tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text(
        "from lens_jax.config import *\n"
        "config = TrainConfig(model=DenoiserConfig(layers=1, heads=1, head_dim=16, rope_axes=(4, 6, 6),"
        " latent_channels=48, text_width=512, text_layers=1, dtype='float32'))\n"
    )
    result = bench_train(TrainBench(config=str(config), grid=(2, 2), batch_size=2, repeats=1, matrix=64))
    assert result["ratio"] == pytest.approx(result["step_gflops_per_second"] / result["product_gflops_per_second"])


def test_bad_arguments():
    with pytest.raises(LensError, match="--repeats is 0"):
        DenoiserBench(repeats=0)
    with pytest.raises(LensError, match="cannot be tiled"):
        bench_denoiser(DenoiserBench(height=1000))
