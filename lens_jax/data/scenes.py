"""Scenes of one to three pictograms whose captions are true by construction.

A scene says what lies where; `draw` and `caption` both follow it, so counts, places and background colours can be
checked against what a model paints. Everything is a pure function of the scene, and a scene of its random generator.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lens_jax.data.buckets import Bucket
from lens_jax.data.phrases import BACKGROUNDS, describe
from lens_jax.errors import LensError

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
    # "left", "right", "top", "bottom", "centre", or "" where the caption gives no place.
    position: str
    # Square it is drawn in, pixels: left, top, right, bottom.
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """An image to draw."""

    bucket: Bucket
    # One of COLOURS.
    background: str
    objects: tuple[Placed, ...]
    # Whether the caption names the background; the canonical image of a concept has only its name.
    name_background: bool = True


# Fractions of the image (left, top, right, bottom) by layout. An object fills the shorter side of its cell.
LAYOUTS = {
    "centre": {"centre": (0.07, 0.07, 0.93, 0.93)},
    "halves": {"left": (0.01, 0, 0.5, 1), "right": (0.5, 0, 0.99, 1)},
    "stack": {"top": (0, 0.01, 1, 0.5), "bottom": (0, 0.5, 1, 0.99)},
    "row": {"left": (0.01, 0, 0.335, 1), "centre": (0.335, 0, 0.665, 1), "right": (0.665, 0, 0.99, 1)},
    "column": {"top": (0, 0.01, 1, 0.335), "centre": (0, 0.335, 1, 0.665), "bottom": (0, 0.665, 1, 0.99)},
    "pyramid": {"top": (0.25, 0.01, 0.75, 0.5), "left": (0.01, 0.5, 0.5, 0.99), "right": (0.5, 0.5, 0.99, 0.99)},
    "wedge": {"left": (0.01, 0.01, 0.5, 0.5), "right": (0.5, 0.01, 0.99, 0.5), "bottom": (0.25, 0.5, 0.75, 0.99)},
    # One object off centre: larger than half an image, and still clearly on one side.
    "left": {"left": (0.02, 0, 0.62, 1)},
    "right": {"right": (0.38, 0, 0.98, 1)},
    "top": {"top": (0, 0.02, 1, 0.62)},
    "bottom": {"bottom": (0, 0.38, 1, 0.98)},
}

# How often each kind of scene is drawn.
KINDS = {"one": 0.4, "same two": 0.13, "same three": 0.12, "two": 0.25, "three": 0.1}


def reference_scene(concept: Concept, bucket: Bucket) -> Scene:
    """The canonical image of a concept: alone, centred, on white; its caption is its name."""
    ((_, cell),) = _cells("centre", bucket)
    return Scene(bucket, "white", (Placed(concept, "", _square(cell)),), name_background=False)


def sample_scene(rng: np.random.Generator, concepts: Sequence[Concept], bucket: Bucket) -> Scene:
    """A random scene of one to three objects in a random place on a random background."""
    kind = rng.choice(list(KINDS), p=list(KINDS.values()))
    count = {"one": 1, "same two": 2, "two": 2, "same three": 3, "three": 3}[kind]
    same = kind.startswith("same")
    different = 1 if same else count
    if different > len(concepts):
        raise LensError(f"concepts: {len(concepts)} are too few for scenes; at least 3 are needed")
    chosen = [concepts[i] for i in rng.choice(len(concepts), different, replace=False)] * (count if same else 1)
    cells = _cells(_layout(rng, count, bucket), bucket)
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    # A lone centred object and a group of the same need no place in words.
    silent = same or (count == 1 and cells[0][0] == "centre")
    objects = tuple(
        Placed(concept, "" if silent else position, _square(cell, rng))
        for concept, (position, cell) in zip(chosen, cells)
    )
    return Scene(bucket, background, objects)


def _layout(rng: np.random.Generator, count: int, bucket: Bucket) -> str:
    if count == 1:
        return rng.choice(["centre", "left", "right", "top", "bottom"], p=[0.4, 0.15, 0.15, 0.15, 0.15])
    wide = bucket.width >= bucket.height
    elongation = max(bucket.width / bucket.height, bucket.height / bucket.width)
    # Objects side by side across the short side of a long image would be too small to recognise.
    if count == 2:
        options = ["halves", "stack"] if elongation < 1.25 else ["halves" if wide else "stack"]
    else:
        options = ["pyramid", "wedge"] if elongation < 1.6 else ["row" if wide else "column"]
    return options[rng.integers(len(options))]


def _cells(layout: str, bucket: Bucket) -> list[tuple[str, tuple[float, float, float, float]]]:
    scale = (bucket.width, bucket.height, bucket.width, bucket.height)
    return [
        (position, tuple(fraction * side for fraction, side in zip(cell, scale)))
        for position, cell in LAYOUTS[layout].items()
    ]


def _square(cell: Sequence[float], rng: np.random.Generator | None = None) -> tuple[int, int, int, int]:
    """The largest square in the middle of a cell; with `rng` up to 12 % smaller and pushed about a little."""
    left, top, right, bottom = cell
    side = min(right - left, bottom - top)
    shift_x = shift_y = 0.5
    if rng is not None:
        side *= rng.uniform(0.88, 1)
        shift_x, shift_y = rng.uniform(0.3, 0.7, size=2)
    side = max(1, int(side + 0.1))
    x = round(left + (right - left - side) * shift_x)
    y = round(top + (bottom - top - side) * shift_y)
    return (x, y, x + side, y + side)


def caption(scene: Scene, language: str) -> str:
    """What the scene shows, in `language`."""
    names = [placed.concept.names[language] for placed in scene.objects]
    positions = [placed.position for placed in scene.objects]
    return describe(names, positions, scene.background if scene.name_background else "", language)


def draw(scene: Scene, sprite: Callable[[str, int], object]) -> np.ndarray:
    """uint8 [H, W, 3] of the scene. `sprite(concept id, side)` gives a side x side RGBA PIL image."""
    from PIL import Image

    canvas = Image.new("RGB", (scene.bucket.width, scene.bucket.height), COLOURS[scene.background])
    for placed in scene.objects:
        left, top, right, _ = placed.box
        image = sprite(placed.concept.id, right - left)
        canvas.paste(image, (left, top), image)
    return np.asarray(canvas)


def sprite_cache(masters: Mapping[str, object]) -> Callable[[str, int], object]:
    """`sprite` for `draw`: large square RGBA masters, scaled down with Lanczos once a size."""
    from PIL import Image

    @functools.lru_cache(maxsize=4096)
    def sprite(concept_id: str, side: int):
        return masters[concept_id].resize((side, side), Image.Resampling.LANCZOS)

    return sprite


def scene_meta(scene: Scene) -> dict:
    """What an evaluator needs to check an image, as `Record.meta`."""
    return {
        "kind": "scene" if scene.name_background else "reference",
        "concepts": [placed.concept.id for placed in scene.objects],
        "positions": [placed.position for placed in scene.objects],
        "boxes": [list(placed.box) for placed in scene.objects],
        "background": scene.background,
    }
