"""Scenes as JSON: back to what they were, of every kind, and nothing that is no scene gets through."""

import copy
import json

import numpy as np
import pytest

from lens_jax.data import scene_json
from lens_jax.data.buckets import Bucket
from lens_jax.data.scene_sampler import KINDS, sample_scene
from lens_jax.data.scenes import Concept
from lens_jax.errors import LensError

CONCEPTS = {name: Concept(name, {"en": name}) for name in ("fox", "house", "sun", "key", "frog")}


@pytest.mark.parametrize("kind", KINDS["all"])
def test_there_and_back(kind):
    rng = np.random.default_rng(0)
    for size in (Bucket(64, 64), Bucket(80, 48), Bucket(48, 80)):
        for _ in range(20):
            scene = sample_scene(rng, list(CONCEPTS.values()), size, "all", kind)
            text = json.dumps(scene_json.to_json(scene))
            assert scene_json.from_json(json.loads(text), CONCEPTS, "here") == scene


def test_what_is_no_scene_is_one_line():
    rng = np.random.default_rng(1)
    scene = sample_scene(rng, list(CONCEPTS.values()), Bucket(64, 64), "all", "word and one")
    good = scene_json.to_json(scene)

    def changed(**changes):
        values = copy.deepcopy(good)
        for path, value in changes.items():
            *before, last = path.split("__")
            place = values
            for name in before:
                place = place[int(name) if name.isdigit() else name]
            place[last] = value
        return values

    for values, words in (
        ([], r"here is \[\]; expected an object with bucket, background"),
        ({k: v for k, v in good.items() if k != "word"}, "here: no word; expected"),
        (changed(colour="pink"), "here: unknown field 'colour'"),
        (changed(background="pnk"), r"here\.background is 'pnk' \(did you mean 'pink'\?\); accepted: 'blue', "),
        (changed(bucket__height=0), r"here\.bucket\.height is 0; expected 1 to"),
        (changed(bucket__height=True), r"here\.bucket\.height is True"),
        (changed(objects__0__concept="foxx"), r"here\.objects\[0\]\.concept is 'foxx' \(did you mean 'fox'\?\)"),
        (changed(objects__0__concept=["fox"]), r"here\.objects\[0\]\.concept is \['fox'\]"),
        (changed(objects__0__position="up"), r"here\.objects\[0\]\.position is 'up'"),
        (changed(objects__0__box=[1, 2, 3]), r"here\.objects\[0\]\.box is \[1, 2, 3\]; expected left, top"),
        (changed(objects="fox"), r"here\.objects is 'fox'; expected a list"),
        (changed(relation="left_of"), r"here\.relation is 'left_of', which is of two objects; there are 1"),
        (changed(word__text="tea"), r"here\.word\.text is 'tea'; expected capital letters"),
        (changed(word__font="comic"), r"here\.word\.font is 'comic'"),
        (changed(name_background=1), r"here\.name_background is 1; expected true or false"),
    ):
        with pytest.raises(LensError, match=words) as error:
            scene_json.from_json(values, CONCEPTS, "here")
        assert "\n" not in str(error.value)
