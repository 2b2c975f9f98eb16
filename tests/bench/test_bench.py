"""The benchmarks run and report what they promise. No speed is judged here."""

import json

import pytest

from lens_jax.bench import measure
from lens_jax.bench.convert import ConvertBench, bench_convert
from lens_jax.bench.decode import DecodeBench, bench_decode
from lens_jax.bench.denoiser import DenoiserBench, bench_denoiser
from lens_jax.bench.sample import SampleBench, bench_sample
from lens_jax.bench.student import StudentBench, bench_student
from lens_jax.bench.text import TextBench, bench_text
from lens_jax.bench.train import TrainBench, bench_train
from lens_jax.errors import LensError


@pytest.mark.slow
def test_denoiser(tmp_path):
    path = tmp_path / "result.json"
    bench = DenoiserBench(height=64, width=32, text_tokens=4, dtype="float32", repeats=1, json=str(path))
    result = bench_denoiser(bench)
    written = json.loads(path.read_text())
    assert written["result"] == result
    assert written["options"]["height"] == 64
    assert written["benchmark"] == "bench denoiser"
    assert (result["image_tokens"], result["text_tokens"]) == (8, 4)
    assert result["tflops_per_second"] == pytest.approx(result["operations"] / result["seconds"] / 1e12)
    assert "mfu" not in result  # a CPU has no listed peak
    assert result["program_megabytes"] > 4e-6 * result["parameters"]


def test_shares_of_peak(monkeypatch):
    """Recomputation counts as executed, not as work."""
    monkeypatch.setattr(measure.flops, "peak", lambda kind: 100e12)
    figures = measure.rate(40 * 10**12, 1.0, "bfloat16", 50 * 10**12)
    assert (figures["mfu"], figures["hfu"]) == (0.4, 0.5)
    assert "mfu" not in measure.rate(10**12, 1.0, "float32")


@pytest.mark.slow
def test_full_size_compiles_without_memory_for_weights():
    result = bench_denoiser(DenoiserBench(size="lens", height=1024, width=1024, compile_only=True))
    assert result["parameters"] == 4_104_225_152
    assert result["operations"] == 16_752_803_315_712
    assert "seconds" not in result


@pytest.mark.slow
def test_text_with_a_shared_beginning():
    result = bench_text(TextBench(tokens=8, prefix=5, batch_size=2, layers=2, dtype="float32", repeats=1))
    assert (result["layers"], result["tokens"], result["prefix"]) == (2, 8, 5)
    assert result["tflops_per_second"] > 0


@pytest.mark.slow
def test_text_written():
    result = bench_text(TextBench(tokens=6, new_tokens=3, batch_size=2, layers=2, dtype="float32", repeats=1))
    assert (result["tokens"], result["new_tokens"], result["batch_size"]) == (6, 3, 2)
    assert result["seconds"] > 0


@pytest.mark.parametrize("encode", [False, True])
def test_autoencoder(encode):
    bench = DecodeBench(size="tiny", height=32, width=64, encode=encode, dtype="float32", repeats=1)
    assert bench_decode(bench)["direction"] == ("encode" if encode else "decode")


@pytest.mark.slow
def test_sample():
    result = bench_sample(SampleBench(height=32, width=32, num_inference_steps=2, text_tokens=8, repeats=1))
    parts = [result[f"{name}_seconds"] for name in ("text", "denoise", "decode", "end_to_end")]
    assert all(part > 0 for part in parts)
    assert result["images_per_second"] == pytest.approx(1 / parts[-1])


@pytest.mark.slow
def test_student():
    """Beside its teacher, here the same model, in a tenth of the passes."""
    result = bench_student(StudentBench(teacher_steps=2, teacher_guidance=1.0, height=16, width=16, repeats=1))
    assert (result["student_passes"], result["teacher_passes"]) == (40, 2)
    assert result["student_over_teacher"] == pytest.approx(result["student_seconds"] / result["teacher_seconds"])


@pytest.mark.slow
def test_convert(tmp_path):
    result = bench_convert(ConvertBench(size="tiny", folder=str(tmp_path), repeats=1, verify=True))
    assert result["ratio_to_copy"] == pytest.approx(result["convert_seconds"] / result["copy_seconds"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_train(tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text(
        "from lens_jax.pretraining.config import *\n"
        "config = TrainConfig(model=DenoiserConfig(layers=1, heads=1, head_dim=16, rope_axes=(4, 6, 6),"
        " latent_channels=48, text_width=512, text_layers=1, dtype='float32'))\n"
    )
    bench = TrainBench(config=str(config), grid=(2, 2), batch_size=2, repeats=1, matrix=64, layers=2, remat="full")
    result = bench_train(bench)
    assert (result["layers"], result["remat"]) == (2, "full")
    names = [name for name in ("unrolled", "scanned") if f"{name}_gflops_per_second" in result]
    assert names
    for name in names:
        rate = result[f"{name}_gflops_per_second"]
        assert result[f"{name}_ratio_to_product"] == pytest.approx(rate / result["product_gflops_per_second"])


def test_bad_arguments(tmp_path):
    with pytest.raises(LensError, match="--repeats is 0"):
        DenoiserBench(repeats=0)
    with pytest.raises(LensError, match="cannot be tiled"):
        bench_denoiser(DenoiserBench(height=1000))
    with pytest.raises(LensError, match="--prefix is 97; with --against torch it must be 0"):
        TextBench(prefix=97, against="torch")
    with pytest.raises(LensError, match="--new-tokens is 5; it goes neither"):
        TextBench(prefix=97, new_tokens=5)
    with pytest.raises(LensError, match="either --checkpoint or --random-weights"):
        SampleBench(checkpoint="x", random_weights=True)
    with pytest.raises(LensError, match="nowhere"):
        bench_convert(ConvertBench(size="tiny", folder=str(tmp_path / "nowhere")))
