"""The exact checker as a reward: of drawn scenes, of scenes drawn wrongly, and of what it has nothing to say to."""

import dataclasses

import numpy as np
import pytest

from lens_jax.data import captions, scene_json, scenes
from lens_jax.data.buckets import Bucket
from lens_jax.data.scene_sampler import sample_scene
from lens_jax.data.scenes import Word
from lens_jax.errors import LensError
from lens_jax.posttraining.prompts.prompt import Prompt
from lens_jax.posttraining.rewards.combine import Judging, RewardsConfig, Weighted
from lens_jax.posttraining.rewards.scene import SceneChecker, SceneOpinion

SIZE = Bucket(64, 64)


@pytest.fixture(scope="module")
def draw(sprite):
    return lambda scene: scenes.draw(scene, sprite)


def prompt_of(scene, id="a"):
    return Prompt(id, captions.caption(scene, "en"), scene=scene_json.to_json(scene))


@pytest.mark.parametrize("kind", ["same four", "four", "relation", "word and one"])
def test_a_drawn_scene_has_all_of_the_reward(concepts, draw, kind):
    scene = sample_scene(np.random.default_rng(3), concepts, SIZE, "all", kind)
    (score,) = SceneChecker("scene", "share").load().score([draw(scene)], [prompt_of(scene)])
    assert score.error is None
    assert {score.values[name] for name in score.values} == {1.0}
    wanted = {"four": "place", "relation": "relation", "word and one": "word"}.get(kind, "count")
    assert {"scene", "scene/share", "scene/all", "scene/objects", "scene/background", f"scene/{wanted}"} <= {
        *score.values
    }


def test_each_fault_costs_its_criterion(concepts, draw):
    """Four different objects in the corners: objects, count, place and background are asked for."""
    scene = sample_scene(np.random.default_rng(5), concepts, SIZE, "all", "four")
    first, second, *rest = scene.objects
    swapped = (
        dataclasses.replace(first, concept=second.concept),
        dataclasses.replace(second, concept=first.concept),
        *rest,
    )
    other = "white" if scene.background != "white" else "pink"
    faults = {
        frozenset(): scene,
        frozenset({"place"}): dataclasses.replace(scene, objects=swapped),
        frozenset({"background"}): dataclasses.replace(scene, background=other),
        frozenset({"objects", "count", "place"}): dataclasses.replace(scene, objects=scene.objects[1:]),
    }
    images, prompt = [draw(one) for one in faults.values()], prompt_of(scene)
    share, strict = (SceneChecker("scene", measure).load() for measure in ("share", "all"))
    for wrong, soft, hard in zip(
        faults, share.score(images, [prompt] * 4), strict.score(images, [prompt] * 4), strict=True
    ):
        verdicts = {name: soft.values[f"scene/{name}"] for name in ("objects", "count", "place", "background")}
        assert verdicts == {name: float(name not in wrong) for name in verdicts}
        assert soft.values["scene"] == soft.values["scene/share"] == 1 - len(wrong) / 4
        assert hard.values["scene"] == hard.values["scene/all"] == float(not wrong)
        assert {**soft.values, "scene": 0} == {**hard.values, "scene": 0}


def test_a_word_is_worth_its_letters(concepts, draw):
    """Word and background are asked for, no object and none there; a letter wrong of four, one too many, nothing."""
    scene = sample_scene(np.random.default_rng(11), concepts, SIZE, "all", "word")
    written = lambda text: dataclasses.replace(
        scene, word=Word(text, scene.word.font, "", (8, 24, 8 + 8 * len(text), 32)) if text else None
    )
    prompt = prompt_of(written("FISH"))
    texts = {"FISH": 1, "FIGH": 3 / 4, "FISHY": 4 / 5, "FIS": 3 / 4, "": 0}
    scores = SceneChecker("scene", "share").load().score([draw(written(text)) for text in texts], [prompt] * len(texts))
    for (text, right), score in zip(texts.items(), scores, strict=True):
        assert score.values["scene/letters"] == pytest.approx(right)
        assert score.values["scene/word"] == score.values["scene/all"] == float(text == "FISH")
        assert score.values["scene"] == pytest.approx((3 + right) / 4)


def test_the_second_opinion_is_of_concepts_alone(concepts, draw):
    """Fitted to few pictures it still tells most pairs of pictograms from those of another scene."""
    reward, rng = SceneOpinion(copies=6).load(), np.random.default_rng(7)
    asked = [sample_scene(rng, concepts, SIZE, "all", "two") for _ in range(24)]
    images, prompts = [draw(scene) for scene in asked], [prompt_of(scene) for scene in asked]
    value = lambda images: [score.values["opinion"] for score in reward.score(images, prompts)]
    assert np.mean(value(images)) >= 0.6
    assert np.mean(value(images[1:] + images[:1])) <= 0.1
    word = sample_scene(rng, concepts, SIZE, "all", "word")
    assert reward.score([draw(word)], [prompt_of(word)])[0].values == {}


@pytest.mark.parametrize("kind", [SceneChecker, SceneOpinion])
def test_a_prompt_without_a_scene_is_left_to_others(concepts, draw, kind):
    scene = sample_scene(np.random.default_rng(5), concepts, SIZE, "all", "one")
    (score,) = kind().load().score([draw(scene)], [Prompt("a", "a fox")])
    assert (score.values, score.error) == ({}, None)


def test_a_scene_that_is_none_ends_the_run(concepts, draw):
    """In one line that names the prompt."""
    scene = sample_scene(np.random.default_rng(5), concepts, SIZE, "all", "one")
    judging = Judging.load(RewardsConfig(train=(Weighted(SceneChecker()),)))
    try:
        pending = judging.submit([draw(scene)], [Prompt("many/7", "a fox", scene={"background": "pink"})])
        with pytest.raises(LensError, match=r"^reward scene: prompt many/7: scene: no bucket, objects, relation"):
            pending.result()
    finally:
        judging.close()
