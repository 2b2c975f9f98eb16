"""Whether an image of the pictogram world shows what its prompt's scene asks for.

By the exact checker; and by a classifier that has nothing in common with it, to be measured and not learnt from: a
model that learns to please the checker without drawing better has no reason to please this as well.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from lens_jax.checker.classifier import SceneClassifier, fit_classifier
from lens_jax.checker.look import look
from lens_jax.checker.references import References, load_references
from lens_jax.checker.verdict import verdict
from lens_jax.data import scene_json
from lens_jax.data.scenes import Concept, Scene, sprite_cache
from lens_jax.data.sources import openmoji
from lens_jax.errors import LensError
from lens_jax.posttraining.prompts.prompt import Prompt
from lens_jax.posttraining.rewards.reward import Score
from lens_jax.posttraining.rewards.text_match import similarity


@dataclasses.dataclass(frozen=True)
class SceneChecker:
    """The exact checker of the pictogram world. Prompts without a scene it leaves to other rewards."""

    # Of the reward, in logs.
    name: str = "scene"
    # "share": share of what the scene asks for that is met (objects, count, places, relation, size, background), a word
    # by its letters. "all": 1 where everything is met, else 0, which is what counts in the end. The share tells a
    # nearly right image from a wrong one, so it says something of groups in which no image is right, or all but a
    # detail are. Both are logged, and so is each criterion.
    measure: Literal["share", "all"] = "share"

    def load(self) -> "SceneReward":
        return SceneReward(self)


@dataclasses.dataclass(frozen=True)
class SceneOpinion:
    """A classifier of the concepts that an image shows, fitted to drawn scenes. Its answer is 1 where they are those of
    the scene, else 0. It sees no places, counts, words or backgrounds."""

    # Of the reward, in logs.
    name: str = "opinion"
    # Pictures of each pictogram that it is fitted to before the run, in seconds.
    copies: int = 12

    def __post_init__(self):
        if self.copies < 1:
            raise LensError(f"opinion: copies is {self.copies}; it must be at least 1")

    def load(self) -> "OpinionReward":
        return OpinionReward(self)


class SceneReward:
    """`<name>`, and beside it `<name>/share`, `<name>/all`, `<name>/<criterion>` of those that the scene has, and of a
    word `<name>/letters`."""

    def __init__(self, config: SceneChecker):
        self.config = config
        self.name = config.name

    def check(self) -> None:
        """Draws the pictograms it compares with, once a process, in some seconds."""
        _ = self._references, _concepts()

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> list[Score]:
        return [
            Score() if prompt.scene is None else self._score(image, _scene(self.name, prompt))
            for image, prompt in zip(images, prompts)
        ]

    def close(self) -> None:
        """Nothing is held."""

    def _score(self, image: np.ndarray, scene: Scene) -> Score:
        seen = look(image, self._references)
        verdicts = verdict(scene, seen)
        parts = dict(verdicts)
        if scene.word:
            parts["word"] = verdicts["letters"] = letters_right(scene.word.text, [word.text for word in seen.words])
        values = {"share": sum(parts.values()) / len(parts), "all": float(all(verdicts.values()))}
        named = {f"{self.name}/{what}": float(value) for what, value in (values | verdicts).items()}
        return Score({self.name: values[self.config.measure], **named})

    @property
    def _references(self) -> References:
        return load_references()


def letters_right(wanted: str, found: Sequence[str]) -> float:
    """How near what was read is to a word, 0 to 1: letters that are missing, wrong, or too many all count."""
    read = "".join(found)
    return min(similarity(wanted, read), similarity(read, wanted)) if read else 0.0


class OpinionReward:
    """`<name>` of the images of prompts whose scenes have objects."""

    def __init__(self, config: SceneOpinion):
        self.config = config
        self.name = config.name

    def check(self) -> None:
        """Fits the classifier, once a process."""
        _fitted(self.config.copies)

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> list[Score]:
        return [self._score(image, prompt) for image, prompt in zip(images, prompts)]

    def close(self) -> None:
        """Nothing is held."""

    def _score(self, image: np.ndarray, prompt: Prompt) -> Score:
        scene = None if prompt.scene is None else _scene(self.name, prompt)
        if scene is None or not scene.objects:
            return Score()
        return Score({self.name: float(_fitted(self.config.copies).agrees(scene, image))})


def _scene(name: str, prompt: Prompt) -> Scene:
    """LensError for a scene that is none: it would be none for every image of the prompt."""
    return scene_json.from_json(prompt.scene, _concepts(), f"reward {name}: prompt {prompt.id}: scene")


@functools.cache
def _concepts() -> dict[str, Concept]:
    return {concept.id: concept for concept in openmoji.load_concepts(len(openmoji.CONCEPTS))}


@functools.cache
def _fitted(copies: int) -> SceneClassifier:
    return fit_classifier(tuple(_concepts().values()), sprite_cache(load_references().masters), copies)
