"""Plans of a distillation: passes of a global step counted by hand, the memory of three networks, and the command."""

import dataclasses
import json

import pytest

from lens_jax import cli
from lens_jax import config as config_files
from lens_jax.planning import distill, fit, lowering, program
from lens_jax.posttraining import distill_recipe as recipe
from lens_jax.posttraining.distill_config import (
    DiscriminatorConfig,
    DistillConfig,
    GeneratorConfig,
    MatchingConfig,
    WarmStartConfig,
)


def load(name: str, **changes) -> DistillConfig:
    """A packaged config at 1024 x 1024, with a kernel by name."""
    config = dataclasses.replace(config_files.load(name, DistillConfig), **changes)
    data = dataclasses.replace(config.data, path="nowhere", buckets=("1024x1024",))
    return lowering.on_platform(fit.with_remat(dataclasses.replace(config, data=data), "full"), "cuda")


def passes(**changes) -> float:
    config = load("distill_lens", **changes)
    return distill.volume(config, distill.uses(config)).passes


def test_passes_of_a_global_step():
    """Four updates of sample (2.5), fake score (3) and features of image, sample and moved image; and the student's.

    That is its sample (1.5 and, with its gradient, 3), both scores, the teacher's with and without caption; a pass
    without caption has 4,096 of 4,268 tokens, and the way back through the teacher's blocks is a pass and its attention
    (a third of it) once more.
    """
    last = DiscriminatorConfig(blocks=(48,))
    whole = passes(discriminator=last)
    assert whole == pytest.approx(4 * (2.5 + 3 + 3) + (1.5 + 3 + 1 + 1 + 1 + 0.95 + 1.32), rel=0.01)
    # Of the middle block, features are half a pass.
    half = passes()
    assert whole - half == pytest.approx(4 * 1.5 + 1.32 / 2, rel=0.02)
    without = dataclasses.replace(DiscriminatorConfig(), r1_gamma=0.0)
    assert half - passes(discriminator=without) == pytest.approx(4 * 0.5, rel=0.01)
    assert half - passes(gan=False) == pytest.approx(4 * 1.5 + 1.32 / 2, rel=0.02)
    assert half - passes(matching=MatchingConfig(guidance_scale=1.0)) == pytest.approx(1.95, rel=0.01)
    # A step of its own for each row: as good as always all four.
    each = GeneratorConfig(trained_step="sample")
    assert passes(generator=each) - half == pytest.approx(5 * 1.5, rel=0.01)
    config = load("distill_lens")
    found = distill.volume(config, distill.uses(config))
    assert found.images == 5 * 32
    # 1,000 of them are about what the report's run has: 0.1 % of its pre-training.
    assert 1000 * (found.fake + found.student) == pytest.approx(2.0e19, rel=0.1)


def test_a_warm_start_is_counted_as_it_is_traced():
    """The teacher's guided path between the student's levels, and each of its steps once more: products of the trace.

    They are 2 % less, since neither latents nor captions have a gradient, and nothing is padded.
    """
    warm = WarmStartConfig(steps=10, substeps=3, guidance_scale=4.0)
    config = load("distill_small", warm_start=warm)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, buckets=("64x64",), pad_areas=False),
        model=dataclasses.replace(config.model, attention="xla"),
    )
    data = distill.uses(config, config.text.max_tokens)
    use = data.buckets[0]
    state, batch = recipe.abstract_state(config, None), recipe.abstract_batch(config, use.images, use.tokens, None)
    traced = recipe.make_programs(config).warm_start.train_step.trace(state, batch, 0)
    counted = program.products(program.read(traced.jaxpr))
    found = distill.volume(config, data)
    assert found.warm_start == pytest.approx(counted, rel=0.03)
    # A global step proper costs what it did.
    without = distill.volume(dataclasses.replace(config, warm_start=WarmStartConfig()), data)
    assert without == dataclasses.replace(found, warm_start=0.0)


def test_an_accumulated_step_has_as_much_work():
    """Eight batches of four images an update are one of 32; an adapter spares the gradients of what is frozen."""
    full, adapter = (
        distill.volume(config, distill.uses(config)) for config in (load("distill_lens"), load("distill_lens_lora"))
    )
    assert adapter.images == full.images
    assert adapter.encoders == pytest.approx(full.encoders)
    assert 0.8 * full.fake < adapter.fake < full.fake


def test_a_device_holds_three_networks():
    config = load("distill_lens")
    mesh = lowering.abstract_mesh(config.mesh, 8)
    held = distill.resident(config, mesh, distill.uses(config))
    master = 4 * 4_104_225_152 / 8
    for kind in ("student", "fake score", "average of the student"):
        assert held[kind] == pytest.approx(master, rel=0.01)
    # No first moment.
    assert held["moments"] == pytest.approx(2 * master, rel=0.01)
    assert held["teacher"] == pytest.approx(master / 2, rel=0.01)
    assert held["discriminator"] == pytest.approx(4 * 0.44e6, rel=0.05)
    offloaded = dataclasses.replace(config, offload=True)
    assert distill.resident(offloaded, mesh, distill.uses(config))["moments"] == 0
    assert distill.host_bytes(offloaded, mesh) == held["moments"] + held["average of the student"]


def test_captions_alone_need_neither_images_nor_an_encoder_of_them(tmp_path):
    config = load("distill_lens", gan=False, captions=str(tmp_path / "captions.txt"), sizes=("512x512",))
    use = distill.uses(config)
    assert [str(one.bucket) for one in use.buckets] == ["512x512"]
    assert "captions.txt" in use.source
    assert distill.resident(config, None, use)["discriminator"] == 0
    with_images = load("distill_lens", gan=True)
    assert distill.volume(config, use).encoders < distill.volume(with_images, distill.uses(with_images)).encoders


def test_a_plan_without_its_data_is_of_the_sizes_of_its_config():
    for name, sizes, tokens in (("distill_small", 5, 70), ("distill_lens", 9, 4232)):
        config = config_files.load(name, DistillConfig)
        data = dataclasses.replace(config.data, path="nowhere")
        use = distill.uses(dataclasses.replace(config, data=data))
        assert (len(use.buckets), {one.tokens.padded for one in use.buckets}) == (sizes, {tokens})


def run(capsys, *argv) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_plan(capsys, tmp_path):
    """The command, its numbers against each other; and one line for what cannot be."""
    path = tmp_path / "plan.json"
    small = (
        "--model.layers",
        "2",
        "--model.remat",
        "full",
        "--data.buckets",
        "64x64",
        "--no-lower",
        "--price",
        "2",
        "--json",
        str(path),
    )
    code, out, _ = run(capsys, "plan", "distill_lens", "--devices", "8", "--hardware", "a100-80", *small)
    assert not code
    assert "all parameters" in out
    assert "1,000 global steps: hours" in out
    found = json.loads(path.read_text())
    assert found["programs"].keys() == {"fake score, step", "student, step"}
    assert found["peak_bytes"] == sum(found["resident"].values()) + max(found["programs"].values())
    assert found["cost"] == pytest.approx(2 * 8 * 1000 * found["seconds"] / 3600)
    warm = ("--warm-start.steps", "400", "--warm-start.substeps", "2")
    code, out, _ = run(capsys, "plan", "distill_lens", "--devices", "8", "--hardware", "a100-80", *small, *warm)
    assert not code
    assert "1,000 global steps, 400 of them of the warm start: hours" in out
    warmed = json.loads(path.read_text())
    assert warmed["programs"].keys() == {*found["programs"], "warm start, step"}
    assert warmed["seconds"] == found["seconds"]
    expected = 600 * found["seconds"] + 400 * warmed["warm_start_seconds"]
    assert 3600 * warmed["hours"] == pytest.approx(expected)
    for argv, words in (
        (("--devices", "3"), "32"),
        (("--devices", "0"), "--devices is 0; it must be at least 1"),
        (("--mfu", "2"), "--mfu is 2.0"),
        (("--caption-tokens", "-1"), "--caption-tokens is -1; it must be at least 0"),
    ):
        code, _, err = run(capsys, "plan", "distill_lens", *small, *argv)
        assert (code, err.count("\n")) == (2, 1)
        assert words in err


@pytest.mark.slow
def test_what_to_change_where_it_does_not_fit(capsys):
    """One H100 is too small for all parameters; what is proposed is measured as the plan itself is."""
    code, out, err = run(capsys, "plan", "distill_lens", "--devices", "1", "--data.buckets", "1024x1024", "--no-lower")
    assert code == 2
    assert "student" in out
    assert "GB a device do not fit" in err
    assert " would (" in err
    code, out, _ = run(capsys, "plan", "distill_lens_lora", "--devices", "1", "--data.buckets", "1024x1024")
    assert not code
    assert "fake score, micro-step, cudnn" in out
