"""`lens-jax convert` and `info` on a small release, and a run exported for PyTorch."""

import dataclasses

import jax
import numpy as np
import pytest

from lens_jax import cli
from lens_jax.convert import denoiser, folder, release, source, verify
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.errors import LensError
from lens_jax.pretraining.job import train
from lens_jax.run import store


def run(capsys, *argv) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_there_and_back(capsys, goldens, tmp_path):
    release, ours, back = goldens / "tiny_release", tmp_path / "lens-turbo", tmp_path / "back"
    code, out, _ = run(capsys, "convert", "to-jax", str(release), str(ours), "--variant", "turbo", "--verify")
    assert code == 0
    assert "all equal to the bit" in out
    code, out, _ = run(capsys, "info", str(ours))
    assert code == 0
    assert "variant turbo, 4 steps at guidance 1" in out
    code, out, _ = run(capsys, "convert", "to-torch", str(ours), str(back), "--dtype", "bf16", "--verify")
    assert code == 0
    assert "transformer, vae, text_encoder" in out
    assert "all equal to the bit" in out
    with pytest.raises(LensError, match="names, shapes or dtypes are not those of"):
        verify.to_torch(ours, back, "f32")
    path = back / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(LensError, match="differs from"):
        verify.to_torch(ours, back, "bf16")
    code, out, _ = run(capsys, "info", str(back))
    assert "bfloat16" in out


@pytest.mark.slow
def test_run_to_torch(capsys, tiny_config, tmp_path):
    """A trained run exports to names and shapes of the release, and comes back to the same numbers."""
    quiet = dataclasses.replace(tiny_config.samples, every=0)
    state = train(dataclasses.replace(tiny_config, out=str(tmp_path / "run"), steps=1, samples=quiet)).state
    for flags, params in (([], state.ema["denoiser"]), (["--no-ema"], state.params["denoiser"])):
        out = tmp_path / f"out{len(flags)}"
        assert run(capsys, "convert", "to-torch", str(tmp_path / "run"), str(out), "--verify", *flags)[0] == 0
        config = denoiser.read_config(out / "transformer" / "config.json", dtype="float32")
        tensors = SafetensorsFile(out / "transformer" / "diffusion_pytorch_model.safetensors")
        back = denoiser.from_release(config, tensors, "exported")
        jax.tree.map(np.testing.assert_array_equal, back, dict(params))


@pytest.mark.slow
def test_export_of_a_distilled_run(capsys, tiny_config, tmp_path, monkeypatch):
    """Its index and schedule are the release's; read back, its steps and guidance are those of the variant."""
    quiet = dataclasses.replace(tiny_config.samples, every=0)
    train(dataclasses.replace(tiny_config, out=str(tmp_path / "run"), steps=1, samples=quiet))
    read, sampling = store.read_metadata, {"num_inference_steps": 4, "guidance_scale": 1.0}
    monkeypatch.setattr(store, "read_metadata", lambda folder: {**read(folder), "sampling": sampling})
    out = tmp_path / "out"
    assert run(capsys, "convert", "to-torch", str(tmp_path / "run"), str(out), "--verify")[0] == 0
    assert folder.read_json(out / "model_index.json")["_class_name"] == "LensPipeline"
    assert folder.read_json(out / "scheduler" / "scheduler_config.json") == release.SCHEDULER
    assert folder.read_json(out / "transformer" / "config.json")["_name_or_path"] == "Lens-Turbo, trained by lens-jax"
    assert source.variant_of(source.find(out)) == ("turbo", release.VARIANTS["turbo"])
    assert "variant turbo" in run(capsys, "info", str(out))[1]


def test_bad_input(capsys, goldens, tmp_path):
    release = str(goldens / "tiny_release")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    for argv, message in {
        ("convert", "to-jx", release, "x"): "did you mean 'to-jax'?",
        ("convert", "to-jax", str(tmp_path), str(tmp_path / "x")): "no release folder",
        ("convert", "to-jax", release, str(tmp_path / "there"), "--variant", "lens"): "not empty",
        ("convert", "to-torch", str(tmp_path / "absent"), str(tmp_path / "x")): "no such file or folder",
        ("convert", "to-torch", str(tmp_path / "there"), str(tmp_path / "x")): "holds no checkpoint",
    }.items():
        code, _, err = run(capsys, *argv)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    assert {p.name for p in tmp_path.iterdir()} == {"there"}
