"""The small world's run from end to end by its own commands, in smaller: prompts, a packed base, learning, sampling."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lens_jax import config as config_files
from lens_jax.cli import main
from lens_jax.configs.small import config as small
from lens_jax.inference import load, packed
from lens_jax.pretraining.recipe import create_state
from lens_jax.run import store
from lens_jax.run.config import CheckpointConfig
from lens_jax.run.log import read_metrics
from lens_jax.run.state import to_parts


def command(*argv: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert not stop.value.code


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A packed model like the shipped one, narrower, never trained."""
    folder = tmp_path_factory.mktemp("base")
    config = dataclasses.replace(small, model=dataclasses.replace(small.model, layers=1, heads=1))
    shapes = config.codec.abstract_fitted()
    codec = {
        name: np.full(like.shape, 0.5, np.float32) if name != "basis" else np.eye(*like.shape, dtype=np.float32)
        for name, like in shapes.items()
    }

    @jax.jit
    def make():
        state = create_state(config, codec)
        leaves, tree = jax.tree.flatten(state.ema)
        keys = jax.random.split(jax.random.key(7), len(leaves))
        moved = [x + 0.05 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)]
        return state.replace(ema=jax.tree.unflatten(tree, moved))

    checkpoints = store.Store(folder / "run" / "checkpoints", CheckpointConfig())
    meta = {"kind": "pretraining", "config": config_files.to_dict(config), "sizes": [[64, 64]], "position": {}}
    checkpoints.save(1, to_parts(make()), meta)
    checkpoints.close()
    return packed.write(folder / "run", folder / "base.safetensors")


@pytest.mark.slow
def test_prompts_to_samples(base, tmp_path):
    prompts, out = tmp_path / "prompts", tmp_path / "run"
    kinds = ("--tasks", "many", "count_4", "text_4")
    command("prompts", "scenes", "--out", str(prompts), *kinds, "--count", "6", "--held-out-count", "2")
    few = "--rollout.groups 3 --rollout.images 4 --rollout.batch-size 12 --evaluation.images 2 --evaluation.every 2"
    command(
        *("rl", "rl_small", "--init-from", str(base), "--prompts", str(prompts), "--out", str(out), "--steps", "2"),
        *("--evaluation.prompts", str(prompts / "held_out.jsonl"), "--model.layers", "1", "--model.heads", "1"),
        *(*few.split(), "--samples.every", "2", "--rewards.evaluation.0.copies", "1"),
        *("--rewards.train.0.reward.measure", "share"),
    )
    records = read_metrics(out / "metrics.jsonl", "train")
    assert [record["step"] for record in records] == [1, 2]
    names = {"scene", "scene/share", "scene/all", "scene/objects", "scene/count", "scene/background", "reward"}
    assert all(names <= record["reward_by_name"].keys() for record in records)
    evaluations = read_metrics(out / "metrics.jsonl", "evaluation")
    assert [record["step"] for record in evaluations] == [0, 2]
    for record in evaluations:
        assert record["by_category"]["scene/all"].keys() == {"counting", "many", "single object", "text"}
        # Of words alone it says nothing.
        assert record["by_category"]["opinion"].keys() >= {"counting", "many", "single object"}
        assert 0 <= record["by_name"]["scene/all"] <= record["by_name"]["scene"] <= 1
    assert len(list((out / "samples").iterdir())) == 2
    # The run names the packed file as what its adapter is beside.
    assert json.loads((out / "config.json").read_text())["init_from"] == str(base)
    draw = {"num_inference_steps": 2, "guidance_scale": 1.0, "seed": 0, "output_type": "np"}
    mine, theirs = (load.from_pretrained(path)("fox", **draw).images for path in (out, base))
    assert mine.shape == theirs.shape == (1, 64, 64, 3)
    # Of what was never trained images may be worth all the same; then there is nothing to learn.
    assert np.array_equal(mine, theirs) == (not any(record["gradient_norm"] for record in records))
