"""The run as a whole: what it writes, that the reward rises, and that being killed anywhere changes nothing."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lens_jax import config as config_files
from lens_jax.diffusion import draw
from lens_jax.errors import LensError
from lens_jax.inference.pipeline import LensPipeline
from lens_jax.models import lora
from lens_jax.models.lora import LoraConfig
from lens_jax.posttraining import rl_job
from lens_jax.posttraining.judging import Sitting
from lens_jax.posttraining.prompts.prompt import Prompt, write_prompts
from lens_jax.posttraining.rewards.reward import Score
from lens_jax.posttraining.rl_config import RlConfig, RolloutConfig
from lens_jax.run.log import read_metrics


def all_arrays(state) -> dict[str, np.ndarray]:
    raw = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(raw(leaf)) for path, leaf in leaves}


def assert_same_bits(actual, expected):
    actual, expected = all_arrays(actual), all_arrays(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.fixture(scope="module")
def red():
    """Redness, from the conftest, which is no module to import."""

    def make():
        class Red:
            name = "red"

            def __init__(self):
                self.asked = []

            def check(self):
                pass

            def close(self):
                pass

            def score(self, images, prompts):
                self.asked += [(prompt.id, image.tobytes()) for image, prompt in zip(images, prompts)]
                grey = lambda image: image.astype(float).mean(-1)
                value = lambda image: float((image[..., 0] - grey(image)).mean() / 255)
                return [Score({"red": value(image), "red/green": float(image[..., 1].mean())}) for image in images]

        return Red()

    return make


@pytest.fixture(scope="module")
def whole(rl_config, run_rl, red, tmp_path_factory):
    """(state, reward, folder) of a run without interruption."""
    out, reward = tmp_path_factory.mktemp("rl") / "whole", red()
    state = run_rl(dataclasses.replace(rl_config, out=str(out)), reward).state
    return state, reward, out


def test_run_writes_all_it_promises(whole, rl_config):
    state, _, out = whole
    assert int(state.step) == 3
    assert set(state.params) == set(state.ema) == {"lora"}
    assert set(state.frozen) == {"denoiser", "codec"}
    records = read_metrics(out / "metrics.jsonl", "train")
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert {
            "reward", "reward_by_name", "reward_by_category", "reward_by_size", "zero_variance_groups", "missing", "kl",
            "advantages_clipped", "policy_loss", "guards", "judge_seconds", "drawing_seconds",
        } <= record.keys()  # fmt: skip
        assert record["reward_by_name"].keys() == {"red", "red/green", "reward"}
        assert record["reward"] == pytest.approx(record["reward_by_name"]["red"], rel=1e-4)
        assert record["reward_by_size"].keys() == {"8x8", "8x12"}
        assert {"dark_share", "edge_density", "colour_entropy", "blockiness", "diversity"} == record["guards"].keys()
    # Before the first step the trained policy is the reference, and KL is exactly 0; then it is not.
    assert records[0]["kl"] == 0
    assert records[1]["kl"] > 0
    evaluations = read_metrics(out / "metrics.jsonl", "evaluation")
    assert [record["step"] for record in evaluations] == [0, 3]
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step_0000000.png", "step_0000003.png"]
    saved = config_files.from_dict(RlConfig, json.loads((out / "config.json").read_text()), "config.json")
    assert saved == dataclasses.replace(rl_config, out=str(out))
    assert {path.name for path in (out / "rewards").iterdir()} == {
        "epoch_000000.jsonl", "epoch_000001.jsonl", "epoch_000002.jsonl", "evaluation_000000.jsonl",
        "evaluation_000003.jsonl",
    }  # fmt: skip
    # No checkpoint holds the frozen base.
    from lens_jax.run import store

    parts = {path.partition("/")[0] for path in store.saved_shapes(store.find(out))}
    assert parts == {"params", "frozen", "ema", "opt_state", "extra", "progress"}
    assert not [path for path in store.saved_shapes(store.find(out)) if path.startswith("frozen/denoiser")]


def test_old_policy_follows_by_its_schedule(whole):
    """After n epochs, old <- eta old + (1 - eta) trained with eta 0.001 n: nearly what is trained, and not quite."""
    state = whole[0]
    trained, old = (jax.tree.leaves(tree) for tree in (state.params["lora"], state.extra["old"]))
    distance = sum(float(np.square(a - b).sum()) for a, b in zip(trained, old)) ** 0.5
    size = sum(float(np.square(a).sum()) for a in trained) ** 0.5
    assert 0 < distance < 0.01 * size


@pytest.mark.slow
def test_a_run_is_drawn_from_with_its_adapter(whole, rl_config):
    """By LensPipeline, from what the checkpoint and the base have: the moving average, bit for bit as in the run."""
    state, _, out = whole
    pipe = LensPipeline.from_pretrained(out)
    settings = {"height": 8, "width": 8, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    found = pipe("a cat", **settings).images
    features, noise = pipe.text_encoder.encode(["a cat"]), draw.seed_noise(0, 1, 16, 12)
    inputs = noise, (features.layers, features.lengths), None, (4, 4)
    adapter = lora.scaled(state.ema["lora"], rl_config.lora.scale)
    expected = draw.draw(rl_config.model, state.frozen["denoiser"], *inputs, num_inference_steps=2, lora=adapter)
    np.testing.assert_array_equal(found, expected)
    without = draw.draw(rl_config.model, state.frozen["denoiser"], *inputs, num_inference_steps=2)
    assert np.abs(np.asarray(without) - found).max() > 1e-3


@pytest.mark.parametrize("where", ["drawing", "judging", "updating"])
def test_killed_anywhere_the_end_is_the_same(whole, rl_config, run_rl, red, tmp_path, monkeypatch, where):
    """In the second epoch. The same bits, and of every image of every epoch the reward was asked once."""
    config = dataclasses.replace(rl_config, out=str(tmp_path / "run"))
    reward, seen = red(), [0]

    class Killed(Exception):
        pass

    def dying(function, at):
        def call(*args, **kwargs):
            seen[0] += 1
            if seen[0] == at:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if where == "drawing":
            # The evaluation before the first step, the first epoch, and then in the second one after a group is judged.
            patch.setattr(Sitting, "add", dying(Sitting.add, 2 + 2 + 2))
        elif where == "judging":
            patch.setattr(reward, "score", dying(reward.score, 2 + 2 + 2))
        else:
            patch.setattr(rl_job, "micro_batches", dying(rl_job.micro_batches, 2))
        with pytest.raises(Killed):
            run_rl(config, reward)
    resumed = run_rl(config, reward)
    assert_same_bits(resumed.state, whole[0])
    assert sorted(reward.asked) == sorted(whole[1].asked)
    steps = [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl", "train")]
    assert steps == [1, 2, 3]
    journal = lambda out: sorted(path.name for path in (out / "rewards").iterdir())
    assert journal(tmp_path / "run") == journal(whole[2])


def test_a_journal_of_other_rewards_does_not_count(whole, rl_config, run_rl, red, tmp_path):
    """Nor a line that is damaged; what is there of them is asked again."""
    config = dataclasses.replace(rl_config, out=str(tmp_path / "run"), steps=1)
    folder = tmp_path / "run" / "rewards"
    folder.mkdir(parents=True)
    lines = (whole[2] / "rewards" / "epoch_000000.jsonl").read_text().splitlines()
    (folder / "epoch_000000.jsonl").write_text(lines[0].replace('"mark": "', '"mark": "x') + "\n" + lines[1][:-9])
    reward = red()
    run_rl(config, reward)
    # Two groups of four; evaluations of two prompts with two images before and after.
    assert len(reward.asked) == 8 + 2 * 4


def test_bad_input_is_one_line(rl_config, run_rl, red, tmp_path):
    """Before anything is written."""
    config = dataclasses.replace(rl_config, out=str(tmp_path / "run"))
    rollout = rl_config.rollout
    with pytest.raises(LensError, match=r"rollout\.images is 1; a group has at least 2 images"):
        RolloutConfig(images=1)
    for changes, message in (
        (
            {"rollout": dataclasses.replace(rollout, groups=6)},
            r"rollout\.groups is 6, of different prompts; the set has 5",
        ),
        ({"rollout": dataclasses.replace(rollout, sizes=("9x9",))}, "9x9"),
        (
            {"rollout": dataclasses.replace(rollout, updates=3)},
            r"rollout\.updates is 3, which does not divide the 2 batch",
        ),
        ({"init_from": ""}, "init_from names nothing to train"),
        ({"init_from": str(tmp_path / "absent")}, "no such file or folder"),
        ({"model": dataclasses.replace(rl_config.model, text_width=64)}, r"model\.text_width is 64"),
    ):
        with pytest.raises(LensError, match=message) as error:
            run_rl(dataclasses.replace(config, **changes), red())
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run" / "config.json").exists()
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    rubrics = tmp_path / "rubrics.jsonl"
    rubrics.write_text('{"id": "a", "prompt": "x", "rubrics": {"a": "b"}}\n')
    for path, message in ((empty, "no prompts in it"), (rubrics, r"rubrics: expected a list")):
        with pytest.raises(LensError, match=message):
            rl_job.train(dataclasses.replace(config, prompts=str(path)))
    with pytest.raises(LensError, match="prompts names no file"):
        rl_job.train(dataclasses.replace(config, prompts=""))
    with pytest.raises(LensError, match="no category 'nothing'"):
        rl_job.train(dataclasses.replace(config, prompts_without=("nothing",)))


def test_parts_of_the_set(rl_config, tmp_path):
    """The ablations: a share of each category, a smaller one within a larger; and one category left out."""
    path = tmp_path / "set.jsonl"
    write_prompts(path, [Prompt(id=f"{c}{i}", prompt=c, category=c) for c in "ab" for i in range(8)])
    config = dataclasses.replace(rl_config, prompts=str(path))
    part = lambda **changes: {prompt.id for prompt in rl_job.prompts_of(dataclasses.replace(config, **changes))}
    quarter, half = part(prompts_fraction=0.25), part(prompts_fraction=0.5)
    assert quarter < half < part()
    assert [sorted(id[0] for id in ids) for ids in (quarter, half)] == [["a"] * k + ["b"] * k for k in (2, 4)]
    assert part(prompts_without=("b",)) == {f"a{i}" for i in range(8)}


def test_rewards_that_fail(rl_config, run_rl, red, tmp_path):
    """Too many missing end the run in one line that says why; so does a program that is wrong."""
    config = dataclasses.replace(rl_config, out=str(tmp_path / "run"))
    evaluation = dataclasses.replace(config.evaluation, every=0)

    class Silent(type(red())):
        def score(self, images, prompts):
            return [Score(error="the judge is asleep") for _ in images]

    class Wrong(type(red())):
        def score(self, images, prompts):
            raise LensError("no such judge")

    quiet = dataclasses.replace(config, evaluation=evaluation, samples=dataclasses.replace(config.samples, every=0))
    with pytest.raises(LensError, match=r"epoch 0: 100\.0% of the images have no reward, .* red: the judge is asleep"):
        run_rl(quiet, Silent())
    with pytest.raises(LensError, match="no such judge"):
        run_rl(dataclasses.replace(quiet, out=str(tmp_path / "wrong")), Wrong())


def test_another_set_or_base_is_refused(whole, rl_config, run_rl, red, tmp_path):
    other = tmp_path / "other.jsonl"
    from lens_jax.posttraining.prompts.prompt import read_prompts

    write_prompts(other, read_prompts(rl_config.prompts)[:4])
    longer = dataclasses.replace(rl_config, out=str(whole[2]), steps=5)
    with pytest.raises(LensError, match=r"prompts .*other\.jsonl: not the set"):
        run_rl(dataclasses.replace(longer, prompts=str(other)), red())
    with pytest.raises(LensError, match="a checkpoint of another model"):
        run_rl(dataclasses.replace(longer, lora=LoraConfig(rank=4, alpha=4)), red())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nft", "grpo", "full"])
def test_the_reward_rises(rl_config, run_rl, red, tmp_path, kind):
    """Of images of a model that was never trained: by more than three deviations of its mean at the start."""
    rollout = RolloutConfig(groups=4, images=12, sizes=("8x8",), batch_size=48, num_inference_steps=5)
    changes = {"rollout": rollout, "steps": 30, "out": str(tmp_path / "run")}
    changes["evaluation"] = dataclasses.replace(rl_config.evaluation, every=0)
    changes["samples"] = dataclasses.replace(rl_config.samples, every=0)
    changes["checkpoint"] = dataclasses.replace(rl_config.checkpoint, every=30)
    if kind == "full":
        changes["lora"] = LoraConfig()
        changes["optimizer"] = dataclasses.replace(rl_config.optimizer, learning_rate=1e-3)
    changes["algorithm"] = "grpo" if kind == "grpo" else "nft"
    run_rl(dataclasses.replace(rl_config, **changes), red())
    records = read_metrics(tmp_path / "run" / "metrics.jsonl", "train")
    rewards = np.array([record["reward"] for record in records])
    error = records[0]["reward_deviation"] / np.sqrt(48)
    assert rewards[-5:].mean() - rewards[:2].mean() > 3 * error, rewards
