"""The run as a whole: what it writes, that being killed within a global step changes nothing, and that it draws."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lens_jax import cli
from lens_jax import config as config_files
from lens_jax.data.config import DataConfig
from lens_jax.diffusion import draw
from lens_jax.errors import LensError
from lens_jax.inference.pipeline import LensPipeline
from lens_jax.models import denoiser, lora
from lens_jax.models.lora import LoraConfig
from lens_jax.posttraining import distill_job, teacher
from lens_jax.posttraining.distill_config import (
    DiscriminatorConfig,
    DistillConfig,
    FakeConfig,
    GeneratorConfig,
    MatchingConfig,
    WarmStartConfig,
)
from lens_jax.posttraining.distill_job import Distillation
from lens_jax.posttraining.distill_meter import DistillMeter, Reference
from lens_jax.pretraining.config import SheetConfig
from lens_jax.run import store
from lens_jax.run.config import CheckpointConfig
from lens_jax.run.log import read_metrics
from lens_jax.run.optimizer import OptimizerConfig


def all_arrays(state) -> dict[str, np.ndarray]:
    raw = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(raw(leaf)) for path, leaf in leaves}


def assert_same_bits(actual, expected):
    actual, expected = all_arrays(actual), all_arrays(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def run(config: DistillConfig):
    return distill_job.train(config, Console(quiet=True)).state


@pytest.fixture(scope="module")
def full(rl_config, base, pictograms) -> DistillConfig:
    """All parameters and the discriminator; three global steps at the report's rates."""
    return DistillConfig(
        init_from=str(base),
        steps=3,
        fake=FakeConfig(updates=2),
        discriminator=DiscriminatorConfig(width=4, groups=2),
        data=DataConfig(path=str(pictograms), batch_size=4, pad_areas=True, threads=0),
        samples=SheetConfig(every=3, prompts=("red apple", "a cat"), sizes=("16x16",), num_inference_steps=2),
        model=rl_config.model,
        codec=rl_config.codec,
        text=rl_config.text,
        checkpoint=CheckpointConfig(every=1, keep=2),
    )


@pytest.fixture(scope="module")
def light(full, rl_config) -> DistillConfig:
    """Two adapters on captions alone, without sheets: few programs, which compile fast."""
    rate = dataclasses.replace(full.optimizer, learning_rate=1e-3)
    return dataclasses.replace(
        full,
        steps=2,
        lora=LoraConfig(rank=2, alpha=4, targets=("attention",)),
        gan=False,
        captions=rl_config.prompts,
        sizes=("8x8",),
        samples=dataclasses.replace(full.samples, every=0, prompts=(), guidance_scale=1.0),
        optimizer=rate,
        fake_optimizer=rate,
    )


@pytest.fixture(scope="module")
def order():
    """The updates of every run in this file, as they are begun."""
    seen, inner = [], Distillation._update
    patch = pytest.MonkeyPatch()

    def update(self, kind, *args):
        seen.append(kind)
        return inner(self, kind, *args)

    patch.setattr(Distillation, "_update", update)
    yield seen
    patch.undo()


@pytest.fixture(scope="module")
def whole(light, order, tmp_path_factory):
    """(config, state, the updates it took) of a run without interruption."""
    config = dataclasses.replace(light, out=str(tmp_path_factory.mktemp("distill") / "whole"))
    start = len(order)
    return config, run(config), order[start:]


class Killed(Exception):
    pass


def killed_at(config: DistillConfig, number: int, monkeypatch) -> None:
    """Run until the update of that number, counted from 1, is about to be taken."""
    inner, seen = Distillation._update, [0]

    def dying(self, *args):
        seen[0] += 1
        if seen[0] == number:
            raise Killed
        return inner(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "_update", dying)
        with pytest.raises(Killed):
            run(config)


def test_order_of_updates_and_what_they_leave(whole, base):
    """The teacher to the bit; student and fake score have moved, towards each other and not to the same."""
    config, state, order = whole
    assert int(state.step) == 2
    assert order == ["fake", "fake", "student"] * 2
    assert set(state.params) == {"lora", "fake"}
    assert set(state.ema) == {"lora"}
    assert_same_bits(state.frozen["teacher"], of_run(base, config))
    student, fake = (state.params[name]["blocks"]["image"]["qkv"]["b"] for name in ("lora", "fake"))
    assert np.abs(student).max() > 0
    assert np.abs(fake).max() > 0
    assert np.abs(student - fake).max() > 0
    # No checkpoint holds the teacher, and no optimiser a first moment.
    shapes = store.saved_shapes(store.find(config.out))
    assert not [path for path in shapes if "teacher" in path]
    moments = [path for path, (shape, _) in shapes.items() if path.startswith("opt_state") and shape]
    assert len(moments) == len(jax.tree.leaves(state.params))


def of_run(folder, config: DistillConfig):
    wanted = {"ema": {"denoiser": denoiser.abstract_params(config.model)}}
    return store.load(store.find(folder), wanted, partial=True)["ema"]["denoiser"]


def test_killed_within_a_global_step(whole, order, tmp_path, monkeypatch):
    """Before the second update of the second step. That step is taken again, with the batches it had."""
    config = dataclasses.replace(whole[0], out=str(tmp_path / "run"))
    killed_at(config, 5, monkeypatch)
    start = len(order)
    # Nor does the teacher draw again what samples are compared with, of whatever batch.
    monkeypatch.setattr(distill_job, "reference_program", None)
    assert_same_bits(run(config), whole[1])
    assert order[start:] == ["fake", "fake", "student"]
    assert measured(config) == measured(whole[0])


def measured(config: DistillConfig) -> list[dict]:
    """What a run has written of its steps, but for what depends on the clock and on the machine."""
    records = read_metrics(Path(config.out, "metrics.jsonl"), "train")
    assert all(record["std_over_teacher"] > 0 for record in records)
    others = {"time", "images_per_second", "data_wait_share", "process_memory_gb"}
    return [{name: value for name, value in one.items() if name not in others} for one in records]


@pytest.mark.slow
def test_a_run_is_drawn_from_in_its_steps(whole, monkeypatch):
    """By the ordinary loader: four steps, no guidance, one network call a step; the average, bit for bit."""
    config, state, _ = whole
    pipe = LensPipeline.from_pretrained(config.out)
    assert (pipe.num_inference_steps, pipe.guidance_scale) == (4, 1.0)
    calls, inner = [], denoiser.apply
    monkeypatch.setattr(denoiser, "apply", lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs))
    found = pipe("a cat", height=8, width=8, output_type="latent").images
    assert len(calls) == 1  # in the body of the loop over steps
    np.testing.assert_array_equal(found, drawn_by(pipe, config, state.frozen["teacher"], state.ema["lora"], 4))
    pipe = LensPipeline.from_pretrained(config.out, part="params")
    found = pipe("a cat", height=8, width=8, output_type="latent").images
    np.testing.assert_array_equal(found, drawn_by(pipe, config, state.frozen["teacher"], state.params["lora"], 4))


def drawn_by(pipe, config: DistillConfig, params, adapter, steps: int) -> np.ndarray:
    features, noise = pipe.text_encoder.encode(["a cat"]), draw.seed_noise(0, 1, 16, 12)
    inputs = noise, (features.layers, features.lengths), None, (4, 4)
    adapter = adapter and lora.scaled(adapter, config.lora.scale)
    return np.asarray(draw.draw(config.model, params, *inputs, num_inference_steps=steps, lora=adapter))


@pytest.mark.slow
def test_all_parameters_and_the_discriminator(full, base, tmp_path, order, monkeypatch):
    """All that is written; a step of 5e-7 that moves the masters; killed in between, the same bits."""
    config, start = dataclasses.replace(full, out=str(tmp_path / "whole")), len(order)
    state = run(config)
    assert order[start:] == ["fake", "fake", "student"] * 3
    assert set(state.params) == {"denoiser", "fake", "head"}
    assert set(state.ema) == {"denoiser"}
    records = read_metrics(Path(config.out) / "metrics.jsonl", "train")
    assert [record["step"] for record in records] == [1, 2, 3]
    by_level = ("dm_size", "ca_size", "dm_ca_cosine", "ca_over_dm", "fake_error", "teacher_error", "gan_share")
    for record in records:
        assert all(len(record[name]) == 4 for name in by_level)
        assert {
            "loss", "fake_loss", "real_right", "fake_right", "r1", "sample_mean", "sample_std", "std_over_teacher",
            "fake_over_teacher", "fake_gradient_norm", "images_per_second",
        } <= record.keys()  # fmt: skip
    assert [path.name for path in (Path(config.out) / "samples").iterdir()] == ["step_0000003.png"]
    saved = config_files.from_dict(
        DistillConfig, json.loads(Path(config.out, "config.json").read_text()), "config.json"
    )
    assert saved == config
    begun = of_run(base, config)
    assert_same_bits(state.frozen["teacher"], begun)
    for name in ("denoiser", "fake"):
        moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), state.params[name], begun)
        assert 0 < min(jax.tree.leaves(moved)) <= max(jax.tree.leaves(moved)) < 2e-5
    scale, before = state.params["denoiser"]["text_norm"]["scale"], begun["text_norm"]["scale"]
    assert np.mean(scale != before) > 0.5
    np.testing.assert_array_equal(scale.astype(jnp.bfloat16), before.astype(jnp.bfloat16))
    pipe = LensPipeline.from_pretrained(config.out)
    found = pipe("a cat", height=8, width=8, output_type="latent").images
    np.testing.assert_array_equal(found, drawn_by(pipe, config, state.ema["denoiser"], None, 4))

    killed = dataclasses.replace(full, out=str(tmp_path / "killed"))
    killed_at(killed, 5, monkeypatch)
    assert_same_bits(run(killed), state)


@pytest.mark.slow
def test_the_options_together(light, full, order, tmp_path, monkeypatch):
    """A warm start, renoised steps, a step for each sample, rescaled guidance, two batches an update, two sizes."""
    config = dataclasses.replace(
        light,
        out=str(tmp_path / "whole"),
        steps=3,
        sizes=("8x8", "8x12"),
        fake=FakeConfig(updates=1),
        generator=GeneratorConfig(num_inference_steps=2, transition="renoise", trained_step="sample"),
        matching=MatchingConfig(rescale=True),
        warm_start=WarmStartConfig(steps=1, substeps=1, learning_rate=1e-3),
        samples=dataclasses.replace(full.samples, every=2, sizes=("8x8",)),
        accumulation=2,
    )
    start = len(order)
    state = run(config)
    assert order[start:] == ["warm_start", *["fake", "student"] * 2]
    changed = dataclasses.replace(config, out=str(tmp_path / "run"))
    killed_at(changed, 5, monkeypatch)
    assert_same_bits(run(changed), state)
    records = read_metrics(Path(config.out) / "metrics.jsonl", "train")
    assert "regression_loss" in records[0]
    assert "fake_loss" in records[1]
    pipe = LensPipeline.from_pretrained(config.out)
    assert (pipe.num_inference_steps, pipe.guidance_scale) == (2, 1.0)
    found = pipe("a cat", height=8, width=8, output_type="latent").images
    np.testing.assert_array_equal(found, drawn_by(pipe, config, state.frozen["teacher"], state.ema["lora"], 2))
    # That run is itself an adapter, and so may make another teacher: base and adapter in one.
    taught, _ = teacher.load(dataclasses.replace(config, lora=LoraConfig()), config.out, None)
    np.testing.assert_allclose(drawn_by(pipe, config, taught, None, 2), found, rtol=1e-3, atol=1e-4)


def test_signs_of_failure_name_what_helps(full):
    """Told when they have lasted, once."""
    said = []
    meter = DistillMeter(full, said.append)
    meter.reference = Reference(mean=0.0, std=1.0)
    pair = lambda x: np.float32([x * 4, 4])
    levels = lambda x: np.stack([np.full(4, x), np.ones(4)])
    for _ in range(15):
        meter.dispatch(4)
        meter.add({
            "finite": True, "loss": 1.0, "sample_mean": pair(0.0), "sample_std": pair(1.3), "real_right": pair(1.0),
            "fake_right": pair(0.98), "fake_error": levels(1.2), "teacher_error": levels(1.0), "gan_share": levels(0.7),
            "ca_over_dm": levels(20.0), "fake_loss": pair(1.0), "losses": np.ones(2),
        })  # fmt: skip
        values = meter.record(2.0)
    assert values["std_over_teacher"] == pytest.approx(1.3)
    assert values["fake_over_teacher"] == pytest.approx(1.2)
    assert values["images_per_second"] == 2.0
    assert len(said) == 5
    for knob in (
        "--matching.guidance-scale (5)", "--fake.updates (2)", "--fake-optimizer.learning-rate (5e-07)",
        "--head-optimizer.learning-rate (0.0001)", "--discriminator.weight (0.001)",
    ):  # fmt: skip
        assert any(knob in line for line in said), knob
    assert all("\n" not in line for line in said)
    # Of a step that was skipped there is nothing but the loss.
    meter = DistillMeter(full, said.append)
    meter.dispatch(4)
    meter.add({"finite": False})
    assert meter.note({"loss": float("nan"), **meter.record(1.0)}) == "loss nan"


def test_bad_input_is_one_line(full, light, tmp_path, capsys):
    """Before anything is written."""
    empty = tmp_path / "empty [0].txt"
    empty.write_text("\n \n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    cases = [
        (full, {"init_from": ""}, "init_from names no teacher"),
        (full, {"init_from": str(tmp_path / "absent")}, "no such file or folder"),
        (full, {"teacher_lora": str(tmp_path / "absent")}, "teacher_lora: "),
        (full, {"teacher_lora": full.init_from}, "trained a denoiser and no adapter"),
        (full, {"model": dataclasses.replace(full.model, text_width=64)}, r"model\.text_width is 64"),
        (full, {"data": dataclasses.replace(full.data, path=str(tmp_path))}, "no data set at"),
        (full, {"samples": dataclasses.replace(full.samples, sizes=("9x9",))}, "9x9"),
        (light, {"captions": str(empty)}, "no captions in it"),
        (light, {"captions": str(binary)}, "not UTF-8"),
        (light, {"captions": str(tmp_path / "absent.txt")}, "no such file"),
        (light, {"sizes": ("8x9",)}, "8x9"),
    ]
    for config, changes, message in cases:
        with pytest.raises(LensError, match=message) as error:
            run(dataclasses.replace(config, out=str(tmp_path / "run"), **changes))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run" / "config.json").exists()
    for make, message in (
        (lambda: dataclasses.replace(light, gan=True), "the discriminator needs images"),
        (lambda: dataclasses.replace(full, discriminator=DiscriminatorConfig(blocks=(3,))), "from 1 to model.layers 2"),
        (lambda: DiscriminatorConfig(width=6, groups=4), "does not divide the 6 channels"),
        (lambda: MatchingConfig(dm_sigmas=(0.5, 0.2)), "two rising numbers"),
        (lambda: MatchingConfig(guidance_scale=0.5), "at least 1"),
        (lambda: FakeConfig(mix=float("nan")), "from 0"),
        (lambda: FakeConfig(updates=0), "at least 1"),
        (lambda: dataclasses.replace(full, lora=LoraConfig(rank=2, dropout=0.1)), r"lora\.dropout"),
        (lambda: dataclasses.replace(full, warm_start=WarmStartConfig(steps=9)), "leaves none of all steps, 3"),
        (lambda: dataclasses.replace(full, optimizer=OptimizerConfig(learning_rate=float("inf"))), "finite"),
    ):
        with pytest.raises(LensError, match=message):
            make()
    for argv in (["distill", "small"], ["distill", "distill_small", "--fake.updates", "x"], ["distill", "nothing"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
