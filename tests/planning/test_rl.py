"""Plans of reinforcement learning: the report's volumes, and its full-size programs lowered without devices."""

import dataclasses
import json

import pytest

from lens_jax import cli
from lens_jax import config as config_files
from lens_jax.models.lora import LoraConfig
from lens_jax.planning import lowering, rl
from lens_jax.posttraining import rl_recipe as recipe
from lens_jax.posttraining.rl_config import RlConfig


def load(name: str, **changes) -> RlConfig:
    return dataclasses.replace(config_files.load(name, RlConfig), **changes)


def test_volumes_of_the_report():
    """48 x 24 images and their rubrics, 10 steps to draw and 9 noise levels to train, as computed by hand elsewhere."""
    config = lowering.on_platform(load("rl_lens"), "cuda")
    turns = recipe.turns(config)
    assert (turns.chunks, turns.levels, turns.updates, turns.micro_steps) == (18, 9, 1, 162)
    full = dataclasses.replace(config, lora=LoraConfig(), model=dataclasses.replace(config.model, remat="full"))
    found = rl.volume(full, rl.sizes_of(full))
    assert found.images == 1152
    assert found.judge_calls == 12_672
    assert config.steps * found.judge_calls == pytest.approx(2.28e6, rel=1e-3)
    # 4,096 + 80 tokens a forward pass are 1.64e13 operations; 9 x (3 + 1 + 1) of them an image, 9 more with remat.
    assert found.drawing == pytest.approx(1.9e17, rel=0.03)
    assert found.training == pytest.approx(8.6e17, rel=0.03)
    assert found.training + found.recomputation == pytest.approx(1.03e18, rel=0.03)
    # An adapter spares the gradients of what is frozen, which is a third of its step.
    adapter = rl.volume(config, rl.sizes_of(config))
    assert 0.7 * found.training < adapter.training < 0.9 * found.training
    few = load("rl_lens_8gpu")
    assert recipe.turns(few).levels == 2
    assert rl.volume(lowering.on_platform(few, "cuda"), rl.sizes_of(few)).judge_calls == 1152


@pytest.mark.parametrize(
    ("name", "devices"), [pytest.param("rl_lens", 64, marks=pytest.mark.slow), ("rl_lens_8gpu", 8)]
)
def test_full_size_programs_lower(name, devices):
    """Drawing, the three forward passes with their backward one, the update and what follows it; with cuDNN."""
    config = lowering.on_platform(load(name), "cuda")
    mesh = lowering.abstract_mesh(config.mesh, devices)
    traced = rl.trace(config, mesh, rl.sizes_of(config))
    kernels = {program: lowering.lower(program, one, mesh, "cuda").kernel for program, one in traced.items()}
    assert kernels == {"rollout": "cudnn", "decode": None, "micro-step": "cudnn", "update": None, "follow": None}
    # The base is sharded over eight devices in bfloat16; the adapter is there as trained, old and averaged.
    held = rl.resident(config, mesh)
    assert held["frozen parameters"] == pytest.approx(8.21e9 / 8, rel=0.01)
    assert held["old policy"] == held["average"] == held["trained parameters"]


@pytest.mark.slow
def test_flow_grpo_lowers_too():
    """Its rollout draws noise for each row, and its batches have two latents."""
    config = lowering.on_platform(load("rl_lens_8gpu", algorithm="grpo"), "cuda")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=2))
    mesh = lowering.abstract_mesh(config.mesh, 8)
    traced = rl.trace(config, mesh, rl.sizes_of(config))
    for program in ("rollout", "micro-step"):
        assert lowering.lower(program, traced[program], mesh, "cuda").kernel == "cudnn"
    # All of a path is kept: eleven latents an image.
    assert rl.host_bytes(config, rl.sizes_of(config), 8) == 1152 * 11 * 4232 * 128 * 4 // 8


@pytest.mark.slow
def test_guidance_is_trained_with_by_flow_grpo_alone():
    """Each policy is then asked without a prompt too, which of 4,096 + 80 tokens is all but 80."""
    plain, guided = (
        [rl.volume(lowering.on_platform(config, "cuda"), rl.sizes_of(config)).training for config in pair]
        for pair in zip(*(
            (config, dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, guidance_scale=4.0)))
            for config in (load("rl_lens"), load("rl_lens", algorithm="grpo"))
        ))
    )  # fmt: skip
    assert guided[0] == plain[0]
    assert guided[1] == pytest.approx(1.97 * plain[1], rel=0.01)


def test_plan(capsys, tmp_path):
    """The command, its numbers against each other; and one line where a run does not fit."""
    path = tmp_path / "plan.json"
    small = ("--model.layers", "2", "--no-lower", "--json", str(path))
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "rl_lens", "--devices", "64", "--hardware", "a100-80", *small, "--price-per-call", "0.001"])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "48 groups of 24 images" in out
    assert "12,672" in out
    found = json.loads(path.read_text())
    assert found["peak_bytes"] == sum(found["resident"].values()) + max(found["programs"].values())
    assert found["hours"] == pytest.approx(180 * found["seconds"] / 3600)
    assert found["cost"] == pytest.approx(180 * 12_672 * 0.001)
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "rl_lens", "--devices", "3", *small])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("lens-jax: error: ")
    assert error.count("\n") == 1
