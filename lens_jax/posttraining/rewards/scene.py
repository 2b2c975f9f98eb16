"""Whether an image of the pictogram world shows what its prompt's scene asks for, read exactly from the pixels."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from lens_jax.checker.references import References, load_references
from lens_jax.checker.verdict import judge
from lens_jax.data import scene_json
from lens_jax.data.scenes import Concept, Scene
from lens_jax.data.sources import openmoji
from lens_jax.posttraining.prompts.prompt import Prompt
from lens_jax.posttraining.rewards.reward import Score


@dataclasses.dataclass(frozen=True)
class SceneChecker:
    """The exact checker of the pictogram world. Prompts without a scene it leaves to other rewards."""

    # Of the reward, in logs.
    name: str = "scene"
    # "share": share of what the scene asks for that is met (objects, count, places, relation, size, background, word).
    # "all": 1 where everything is met, else 0, which is what counts in the end. The share tells a nearly right image
    # from a wrong one, so it says something of groups in which no image is right, or all but a detail are. Both are
    # logged, and so is each criterion.
    measure: Literal["share", "all"] = "share"

    def load(self) -> "SceneReward":
        return SceneReward(self)


class SceneReward:
    """`<name>`, and beside it `<name>/share`, `<name>/all` and `<name>/<criterion>` of those that the scene has."""

    def __init__(self, config: SceneChecker):
        self.config = config
        self.name = config.name

    def check(self) -> None:
        """Draws the pictograms it compares with, once a process, in some seconds."""
        _ = self._references, self._concepts

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> list[Score]:
        return [
            Score() if prompt.scene is None else self._score(image, self._scene(prompt))
            for image, prompt in zip(images, prompts)
        ]

    def close(self) -> None:
        """Nothing is held."""

    def _score(self, image: np.ndarray, scene: Scene) -> Score:
        verdicts = judge(scene, image, self._references)
        values = {"share": sum(verdicts.values()) / len(verdicts), "all": float(all(verdicts.values()))}
        named = {f"{self.name}/{what}": float(value) for what, value in (values | verdicts).items()}
        return Score({self.name: values[self.config.measure], **named})

    def _scene(self, prompt: Prompt) -> Scene:
        """LensError for a scene that is none: it would be none for every image of the prompt."""
        return scene_json.from_json(prompt.scene, self._concepts, f"reward {self.name}: prompt {prompt.id}: scene")

    @property
    def _references(self) -> References:
        return load_references()

    @functools.cached_property
    def _concepts(self) -> dict[str, Concept]:
        return {concept.id: concept for concept in openmoji.load_concepts(len(openmoji.CONCEPTS))}
