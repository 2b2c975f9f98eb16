"""Scenes of pictograms and words whose captions are true by construction.

A scene says what lies where. `draw` paints it and `captions.caption` describes it, so that what a model paints can be
checked against it: objects, counts, places, sizes, backgrounds, words. Everything is a pure function of the scene.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lens_jax.data.buckets import Bucket

COLOURS = {
    "white": (255, 255, 255),
    "blue": (166, 212, 246),
    "green": (178, 230, 165),
    "pink": (252, 182, 208),
    "yellow": (253, 241, 158),
    "grey": (190, 190, 190),
    "purple": (205, 181, 240),
    "orange": (254, 205, 145),
}

# left, top, right, bottom in pixels.
Box = tuple[int, int, int, int]
Relation = Literal["", "left_of", "right_of", "above", "below"]


@dataclass(frozen=True)
class Concept:
    """Something that can be drawn and named."""

    # Short unique name, e.g. "red_apple".
    id: str
    # Name by language, nominative singular without an article.
    names: Mapping[str, str]


@dataclass(frozen=True)
class Placed:
    """One object of a scene."""

    concept: Concept
    # Where it is: "left", "top_right", "centre", ...; "" where the caption gives no place.
    position: str
    # Square it is drawn in.
    box: Box
    # "small", "large", or "" where the caption gives no size.
    size: str = ""


@dataclass(frozen=True)
class Word:
    """A written word of a scene."""

    # Capital letters A to Z.
    text: str
    # One of `lettering.FONTS`.
    font: str
    # Where it is: "top", "bottom", or "" for one alone in the middle.
    position: str
    # A square for each letter.
    box: Box


@dataclass(frozen=True)
class Scene:
    """An image to draw."""

    bucket: Bucket
    # One of COLOURS.
    background: str
    objects: tuple[Placed, ...]
    # Where the first of two objects is, seen from the second; "" where the caption gives places instead.
    relation: Relation = ""
    word: Word | None = None
    # Whether the caption names the background; the canonical image of a concept has only its name.
    name_background: bool = True


# `sprite(concept id, side)` gives a side x side RGBA PIL image.
Sprite = Callable[[str, int], object]


def draw(scene: Scene, sprite: Sprite) -> np.ndarray:
    """uint8 [H, W, 3] of the scene."""
    from PIL import Image

    from lens_jax.data import lettering

    canvas = Image.new("RGB", (scene.bucket.width, scene.bucket.height), COLOURS[scene.background])
    for placed in scene.objects:
        left, top, right, _ = placed.box
        image = sprite(placed.concept.id, right - left)
        canvas.paste(image, (left, top), image)
    if scene.word:
        _, top, _, bottom = scene.word.box
        ink = lettering.letters(scene.word.text, scene.word.font, bottom - top)
        canvas.paste(lettering.INK, scene.word.box, ink)
    return np.asarray(canvas)


def sprite_cache(masters: Mapping[str, object]) -> Sprite:
    """`sprite` for `draw`: large square RGBA masters, scaled down with Lanczos once a size."""
    from PIL import Image

    @functools.lru_cache(maxsize=16384)
    def sprite(concept_id: str, side: int):
        return masters[concept_id].resize((side, side), Image.Resampling.LANCZOS)

    return sprite


def scene_meta(scene: Scene) -> dict:
    """What an evaluator needs to check an image, as `Record.meta`."""
    meta = {
        "kind": "scene" if scene.name_background else "reference",
        "concepts": [placed.concept.id for placed in scene.objects],
        "positions": [placed.position for placed in scene.objects],
        "sizes": [placed.size for placed in scene.objects],
        "boxes": [list(placed.box) for placed in scene.objects],
        "relation": scene.relation,
        "background": scene.background,
    }
    if word := scene.word:
        meta |= {"word": word.text, "word_position": word.position, "word_box": list(word.box), "font": word.font}
    return meta
