"""The checker on images whose truth is known: right on true ones, and never pleased by wrong ones."""

import dataclasses

import numpy as np
import pytest

from lens_jax.checker.look import look
from lens_jax.checker.references import CELLS, References, cell_means, integral
from lens_jax.checker.verdict import judge
from lens_jax.data import scene_sampler, scenes
from lens_jax.data.buckets import Bucket, make_buckets
from lens_jax.data.scenes import Placed, Scene, Word
from lens_jax.evaluation.scene_calibration import CORRUPTIONS, PROPERTIES, blurred, calibrate

BUCKETS = make_buckets(64, ("1:1", "3:4", "4:3", "2:3", "3:2"), 8)
SQUARE = Bucket(64, 64)


@pytest.fixture(scope="module")
def by_id(concepts):
    return {concept.id: concept for concept in concepts}


def two(by_id, first="fox", second="banana", **changes):
    objects = (Placed(by_id[first], "left", (2, 18, 31, 47)), Placed(by_id[second], "right", (33, 17, 63, 47)))
    return dataclasses.replace(Scene(SQUARE, "pink", objects), **changes)


def test_what_was_drawn_is_what_is_seen(concepts, sprite, references):
    """Every kind of scene at every size. docs/scene_bench.md has more of them; of these all are right."""
    rows = calibrate(concepts, sprite, BUCKETS, references, 30, {"clean": CORRUPTIONS["clean"]})
    for name in PROPERTIES[:-1]:
        assert rows["clean"].right[name] == rows["clean"].total[name] > 0, name


def test_what_is_corrupted_a_little_is_still_seen_and_much_is_not(concepts, sprite, references):
    chosen = {name: CORRUPTIONS[name] for name in ("blur 0.8", "noise 16", "jpeg 40")} | {"blur 4": blurred(4)}
    rows = calibrate(concepts, sprite, BUCKETS, references, 10, chosen)
    for name in ("blur 0.8", "noise 16", "jpeg 40"):
        assert rows[name].share("what") >= 0.9
        assert rows[name].share("background") == 1
    assert rows["blur 4"].share("what") < 0.5


def test_each_wrong_thing_is_called_wrong_and_nothing_else_is(by_id, sprite, references):
    scene = two(by_id, word=Word("TEA", "roboto", "top", (8, 0, 56, 16)))
    image = lambda **changes: scenes.draw(dataclasses.replace(scene, **changes), sprite)
    left, right = scene.objects
    swapped = (dataclasses.replace(left, box=right.box), dataclasses.replace(right, box=left.box))
    wrong = {
        (): image(),
        ("objects",): image(objects=(dataclasses.replace(left, concept=by_id["cat"]), right)),
        ("place",): image(objects=swapped),
        ("background",): image(background="orange"),
        ("word",): image(word=dataclasses.replace(scene.word, text="TEN")),
    }
    for expected, pixels in wrong.items():
        failed = {name for name, right_ in judge(scene, pixels, references).items() if not right_}
        # An object that is another one is not at its place either.
        assert failed - {"place"} == set(expected) - {"place"}, expected
        assert ("place" in failed) == (expected in (("place",), ("objects",)))
    one_more = image(objects=(*scene.objects, Placed(by_id["fox"], "", (20, 46, 38, 64))))
    assert not judge(scene, one_more, references)["count"]
    assert not judge(scene, image(objects=(left,)), references)["count"]
    assert not judge(scene, image(word=None), references)["word"]


def test_relations_and_sizes(by_id, sprite, references):
    scene = two(by_id, relation="left_of")
    assert judge(scene, scenes.draw(scene, sprite), references)["relation"]
    for other in ("right_of", "above", "below"):
        assert not judge(dataclasses.replace(scene, relation=other), scenes.draw(scene, sprite), references)["relation"]
    sizes = {"small": (20, 20, 42, 42), "": (14, 14, 50, 50), "large": (9, 9, 55, 55)}
    for drawn, box in sizes.items():
        image = scenes.draw(Scene(SQUARE, "grey", (Placed(by_id["owl"], "", box),)), sprite)
        for asked in ("small", "large"):
            scene = Scene(SQUARE, "grey", (Placed(by_id["owl"], "", box, asked),))
            assert judge(scene, image, references)["size"] == (asked == drawn)


@pytest.mark.parametrize("concept", ["ice", "bat", "rainbow", "sun", "blue_book"])
def test_neighbours_that_touch_are_counted(concept, by_id, sprite, references):
    boxes = [(4, 4, 32, 32), (32, 4, 60, 32), (4, 32, 32, 60), (32, 32, 60, 60)]
    scene = Scene(SQUARE, "yellow", tuple(Placed(by_id[concept], "", box) for box in boxes))
    seen = look(scenes.draw(scene, sprite), references)
    assert [(found.concept, found.box) for found in seen.objects] == [
        (concept, box) for box in sorted(boxes, key=lambda b: (b[1], b[0]))
    ]


def test_what_is_like_nothing_is_unknown(concepts, by_id, sprite, references):
    without = References([name for name in references.ids if name != "octopus"], references.masters)
    image = scenes.draw(scene_sampler.reference_scene(by_id["octopus"], SQUARE), sprite)
    seen = look(image, without)
    # Parts of it may pass for something; the whole does not.
    assert "" in [found.concept for found in seen.objects]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert not any(found.concept for found in look(noise, references).objects)
    blank = np.full((64, 64, 3), (166, 212, 246), np.uint8)
    seen = look(blank, references)
    assert (seen.background, seen.objects, seen.words) == ("blue", (), ())
    assert look(np.zeros((64, 64, 3), np.uint8), references).background == ""


def test_means_of_parts_are_exact():
    values = np.random.default_rng(1).integers(-255, 256, (19, 23, 3))
    box = (3, 2, 20, 18)
    # Every pixel as CELLS x CELLS smaller ones: then parts are whole.
    large = values[2:18, 3:20].repeat(CELLS, 0).repeat(CELLS, 1)
    exact = large.reshape(CELLS, 16, CELLS, 17, 3).mean((1, 3))
    assert np.abs(cell_means(integral(values), np.array([box])).reshape(CELLS, CELLS, 3) - exact).max() <= 0.5
