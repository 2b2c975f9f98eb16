"""Adapters in sampling and export: applied or merged, several, switched; from a run and back into files."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax import LensPipeline, cli
from lens_jax import config as config_files
from lens_jax.convert import denoiser as release
from lens_jax.convert import lora as release_lora
from lens_jax.convert import lora_files, writer
from lens_jax.convert.folder import open_component
from lens_jax.diffusion import draw
from lens_jax.encoders.linear import LinearCodecConfig
from lens_jax.encoders.text import TextFeatures
from lens_jax.errors import LensError
from lens_jax.inference import lora as loading
from lens_jax.models import denoiser, lora
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.lora import LoraConfig
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.recipe import create_state
from lens_jax.run.config import CheckpointConfig
from lens_jax.run.state import to_parts
from lens_jax.run.store import Store

MODEL = DenoiserConfig(
    layers=2, heads=2, head_dim=16, rope_axes=(4, 6, 6), latent_channels=48, text_width=512, text_layers=1,
    dtype="float32",
)  # fmt: skip
ADAPTER = LoraConfig(rank=4, alpha=8, targets=("attention", "mlp", "proj_out"))
STATISTICS = {
    "basis": np.eye(48, dtype=np.float32),
    "mean": np.full(48, 0.1, np.float32),
    "scale": np.float32([0.5]),
}


def random(tree, seed, size):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(np.float32(size) * rng.standard_normal(x.shape, np.float32)), tree)


@pytest.fixture(scope="module")
def base():
    return random(denoiser.abstract_params(MODEL), 0, 0.2)


def adapter_file(folder, seed, config=ADAPTER):
    tree = random(lora.abstract(config, denoiser.abstract_params(MODEL)), seed, 0.2)
    path = folder / f"{seed}.safetensors"
    lora_files.write(path, release_lora.from_tree(tree, MODEL, config.alpha), "comfy")
    return path, lora.scaled(tree, config.scale)


def pipeline(params) -> LensPipeline:
    return LensPipeline(MODEL, LinearCodecConfig(patch=4, components=48), None, params, STATISTICS, (16, 16))


def latents(pipe) -> np.ndarray:
    rng = np.random.default_rng(5)
    text = TextFeatures((rng.standard_normal((2, 3, 512), np.float32),), np.array([3, 1], np.int32))
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe(prompt_embeds=text, **options).images


def error(actual, expected) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def test_applied_switched_joined_and_merged(base, tmp_path):
    (one, first), (two, second) = adapter_file(tmp_path, 1), adapter_file(tmp_path, 2)
    pipe, plain = pipeline(base), latents(pipeline(base))
    alone = lambda tree: latents(pipeline(lora.merged(base, tree)))
    pipe.load_lora_weights(one, 0.5)
    # Another order of float32 sums, over two steps.
    assert error(latents(pipe), alone(lora.scaled(first, 0.5))) < 1e-4
    programs = draw.draw_program._cache_size()
    pipe.unload_lora_weights()
    pipe.load_lora_weights(two)
    assert error(latents(pipe), alone(second)) < 1e-4
    assert draw.draw_program._cache_size() == programs
    pipe.load_lora_weights(one, scale=-0.25)
    both = alone(lora.joined([second, lora.scaled(first, -0.25)]))
    assert error(latents(pipe), both) < 1e-4
    assert error(both, plain) > 0.01
    pipe.fuse_lora()
    assert not pipe.adapters
    programs = draw.draw_program._cache_size()
    assert error(latents(pipe), both) < 1e-4
    # That of the base, which was there.
    assert draw.draw_program._cache_size() == programs
    pipe.unload_lora_weights()
    assert np.array_equal(latents(pipe), plain)


def test_lokr_is_merged(base, tmp_path):
    rng = np.random.default_rng(6)
    parts = {"lokr_w1": rng.standard_normal((4, 4), np.float32), "lokr_w2": rng.standard_normal((24, 8), np.float32)}
    module = "transformer_blocks.1.attn.txt_qkv"
    path = tmp_path / "lokr.safetensors"
    writer.write_file(path, {f"diffusion_model.{module}.{name}": array for name, array in parts.items()})
    pipe = pipeline(base)
    pipe.load_lora_weights(path, 0.5)
    found = release.to_release(MODEL, jax.tree.map(np.asarray, pipe.params))[f"{module}.weight"]
    expected = release.to_release(MODEL, base)[f"{module}.weight"] + 0.5 * np.kron(*parts.values())
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    pipe.unload_lora_weights()
    assert pipe.params is base


def test_scales_and_places():
    assert loading.parse("a/b.safetensors") == ("a/b.safetensors", 1.0)
    assert loading.parse("a/b.safetensors:0.8") == ("a/b.safetensors", 0.8)
    assert loading.parse("C:name:-1e-1") == ("C:name", -0.1)
    assert loading.parse("gs://bucket/run") == ("gs://bucket/run", 1.0)
    with pytest.raises(LensError, match="the scale of an adapter is nan"):
        loading.parse("a:nan")


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """(a run, one that trained an adapter beside its average, the adapter with its scale)."""
    folder = tmp_path_factory.mktemp("runs")
    whole = TrainConfig(out=str(folder / "base"), model=MODEL, codec=LinearCodecConfig(patch=4, components=48))
    adapted = dataclasses.replace(whole, out=str(folder / "lora"), init_from=whole.out, lora=ADAPTER)
    tree = random(lora.abstract(ADAPTER, base), 9, 0.2)
    for config, name, average in ((whole, "denoiser", base), (adapted, "lora", tree)):
        shapes = jax.eval_shape(functools.partial(create_state, config), STATISTICS).replace(key=None)
        state = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), shapes)
        codec = jax.tree.map(jnp.asarray, STATISTICS)
        state = state.replace(ema={name: average}, frozen={"codec": codec}, key=jax.random.key(0))
        saved = Store(folder / config.out / "checkpoints", CheckpointConfig())
        meta = {"kind": "pretraining", "config": config_files.to_dict(config), "position": {}, "sizes": [[16, 16]]}
        saved.save(0, to_parts(state), meta)
        saved.close()
    return folder / "base", folder / "lora", tree


def command(capsys, *argv) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(map(str, argv)))
    captured = capsys.readouterr()
    return stop.value.code, captured.out + captured.err


def exported(folder):
    return open_component(folder / "transformer")


@pytest.mark.slow
def test_a_run_is_sampled_and_exported_with_its_adapter(runs, base, tmp_path, capsys):
    whole, adapted, tree = runs
    expected = release.to_release(MODEL, jax.tree.map(np.asarray, lora.merged(base, lora.scaled(tree, 2.0))))
    # Merged, and by way of a file.
    assert command(capsys, "convert", "to-torch", adapted, tmp_path / "merged", "--verify")[0] == 0
    file = tmp_path / "lora.safetensors"
    code, said = command(capsys, "convert", "to-torch", adapted, file, "--lora-only", "--trigger", "sks")
    assert code == 0
    assert "an adapter of rank 4, alpha 8, of 21 modules" in said
    assert command(capsys, "convert", "to-torch", whole, tmp_path / "other", "--lora", f"{file}:1.0")[0] == 0
    assert command(capsys, "convert", "to-torch", whole, tmp_path / "third", "--lora", adapted)[0] == 0
    merged, other, third = (exported(tmp_path / name) for name in ("merged", "other", "third"))
    for name in expected:
        np.testing.assert_allclose(merged[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(other[name], merged[name], err_msg=name)
        np.testing.assert_array_equal(third[name], merged[name], err_msg=name)
    found = lora_files.read(file, MODEL)
    assert (found.trigger, found.base_model) == ("sks", str(whole))
    # Drawn beside the base as with it merged, and without it as the base.
    pipe = LensPipeline.from_pretrained(adapted)
    assert error(latents(pipe), latents(pipeline(lora.merged(base, lora.scaled(tree, 2.0))))) < 1e-4
    pipe.unload_lora_weights()
    assert np.array_equal(latents(pipe), latents(pipeline(base)))


def test_bad_input_is_one_line_and_nothing_is_written(runs, tmp_path, capsys):
    whole, adapted, _ = runs
    wide = dataclasses.replace(MODEL, heads=4)
    tree = random(lora.abstract(ADAPTER, denoiser.abstract_params(wide)), 1, 0.1)
    lora_files.write(tmp_path / "wide.safetensors", release_lora.from_tree(tree, wide, 8.0), "kohya")
    export = ("convert", "to-torch", whole, tmp_path / "out")
    for argv, message in (
        ((*export, "--lora", tmp_path / "wide.safetensors"), "an adapter of another model"),
        ((*export, "--lora", whole), "a run that trained a denoiser and no adapter"),
        ((*export, "--lora-only"), "a run that trained a denoiser and no adapter"),
        ((*export, "--lora", tmp_path / "absent.safetensors"), "no such file or folder"),
        ((*export, "--style", "kohya"), "give --lora-only too"),
        ((*export, "--denoiser", whole), "it has trained its own"),
        (("convert", "to-torch", adapted, tmp_path / "out", "--lora-only"), "NAME.safetensors"),
        (("sample", "x", "--checkpoint", adapted, "--denoiser", tmp_path / "absent", "--out", tmp_path / "out"),
         "no such file or folder; where that is elsewhere now, give denoiser"),
    ):  # fmt: skip
        code, said = command(capsys, *argv)
        assert code == 2
        # Before it there may be a warning.
        assert [message in line for line in said.splitlines() if "lens-jax: error: " in line] == [True]
        assert "Traceback" not in said
        assert not (tmp_path / "out").exists()
