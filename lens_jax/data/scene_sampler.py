"""Random scenes, and which of them training never sees.

What is held out is a combination whose parts are all seen: a pair of concepts, a concept so many times, one on some
background, a word. So a benchmark on such scenes asks whether a model composes, not whether it remembers.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from lens_jax.data import lettering
from lens_jax.data.buckets import Bucket
from lens_jax.data.phrases import BACKGROUNDS
from lens_jax.data.scenes import Box, Concept, Placed, Scene, Word
from lens_jax.errors import LensError

# How often each kind of scene is drawn. `objects` is the world of the quickstart; `all` that of the small model.
KINDS = {
    "objects": {"one": 0.4, "same two": 0.13, "same three": 0.12, "two": 0.25, "three": 0.1},
    "all": {
        "one": 0.4, "same two": 0.02, "same three": 0.05, "same four": 0.04, "two": 0.05, "relation": 0.05,
        "three": 0.03, "four": 0.06, "word": 0.18, "word and one": 0.12,
    },
}  # fmt: skip
World = Literal["objects", "all"]

# Objects of a kind, and how many of them differ.
OBJECTS = {
    "one": (1, 1), "same two": (2, 1), "same three": (3, 1), "same four": (4, 1), "two": (2, 2), "relation": (2, 2),
    "three": (3, 3), "four": (4, 4), "word": (0, 0), "word and one": (1, 1),
}  # fmt: skip

Cell = tuple[float, float, float, float]
# Fractions of the image (left, top, right, bottom) by layout. An object stands in the middle of its cell.
LAYOUTS: dict[str, dict[str, Cell]] = {
    "centre": {"centre": (0.07, 0.07, 0.93, 0.93)},
    "halves": {"left": (0.01, 0, 0.5, 1), "right": (0.5, 0, 0.99, 1)},
    "stack": {"top": (0, 0.01, 1, 0.5), "bottom": (0, 0.5, 1, 0.99)},
    "row": {"left": (0.01, 0, 0.335, 1), "centre": (0.335, 0, 0.665, 1), "right": (0.665, 0, 0.99, 1)},
    "column": {"top": (0, 0.01, 1, 0.335), "centre": (0, 0.335, 1, 0.665), "bottom": (0, 0.665, 1, 0.99)},
    "pyramid": {"top": (0.25, 0.01, 0.75, 0.5), "left": (0.01, 0.5, 0.5, 0.99), "right": (0.5, 0.5, 0.99, 0.99)},
    "wedge": {"left": (0.01, 0.01, 0.5, 0.5), "right": (0.5, 0.01, 0.99, 0.5), "bottom": (0.25, 0.5, 0.75, 0.99)},
    "corners": {
        "top_left": (0.01, 0.01, 0.5, 0.5), "top_right": (0.5, 0.01, 0.99, 0.5),
        "bottom_left": (0.01, 0.5, 0.5, 0.99), "bottom_right": (0.5, 0.5, 0.99, 0.99),
    },
    # One object off centre.
    "left": {"left": (0.02, 0, 0.62, 1)},
    "right": {"right": (0.38, 0, 0.98, 1)},
    "top": {"top": (0, 0.02, 1, 0.62)},
    "bottom": {"bottom": (0, 0.38, 1, 0.98)},
    # A small one, alone.
    "small": {"centre": (0.29, 0.29, 0.71, 0.71)},
    "small left": {"left": (0.04, 0.29, 0.46, 0.71)},
    "small right": {"right": (0.54, 0.29, 0.96, 0.71)},
    "small top": {"top": (0.29, 0.04, 0.71, 0.46)},
    "small bottom": {"bottom": (0.29, 0.54, 0.71, 0.96)},
    "large": {"centre": (0.0, 0.0, 1.0, 1.0)},
}  # fmt: skip
# Where the middle of a word is, as a part of the height.
WORD_MIDDLE = {"": 0.5, "top": 0.17, "bottom": 0.83}
# Beside a word at the top or the bottom.
BESIDE_WORD: dict[str, Cell] = {"top": (0.1, 0.38, 0.9, 0.98), "bottom": (0.1, 0.02, 0.9, 0.62)}
RELATIONS = {"left": "left_of", "right": "right_of", "top": "above", "bottom": "below"}
HELD_OUT = 12  # one combination of so many
# Everything lies on a grid of so many pixels, the side of the linear codec's squares. A pictogram of some size is then
# the same latent tokens wherever it is.
GRID = 8
# Sides of the squares that pictograms are drawn in: alone in the middle, and elsewhere. With two, a model has 45 tokens
# of each pictogram to learn where the largest square of each cell, as it was, makes it 163.
LARGE, SMALL = 6 * GRID, 3 * GRID
# The larger one in images of less than this on their shorter side, as those of the quickstart.
NARROW, LARGE_IN_NARROW = 56, 4 * GRID


def reference_scene(concept: Concept, bucket: Bucket) -> Scene:
    """The canonical image of a concept: alone, centred, on white; its caption is its name."""
    ((_, cell),) = _cells("centre", bucket)
    return Scene(bucket, "white", (Placed(concept, "", _square(cell, bucket)),), name_background=False)


def sample_scene(
    rng: np.random.Generator,
    concepts: Sequence[Concept],
    bucket: Bucket,
    world: World = "objects",
    kind: str | None = None,
) -> Scene:
    """A random scene of the world, or of one of its kinds."""
    weights = KINDS[world]
    kind = kind or rng.choice(list(weights), p=list(weights.values()))
    count, different = OBJECTS[kind]
    if different > len(concepts):
        raise LensError(f"concepts: {len(concepts)} are too few for such a scene; {different} are needed")
    chosen = [concepts[i] for i in rng.choice(len(concepts), different, replace=False)]
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    if kind.startswith("word"):
        return _with_word(rng, chosen, background, bucket)
    size = ""
    if kind == "one" and world == "all":
        size = rng.choice(["", "small", "large"], p=[0.55, 0.12, 0.33])
    cells = _cells(_layout(rng, count, different < count, bucket, size), bucket)
    if kind == "relation" and rng.random() < 0.5:
        cells = cells[::-1]
    # A lone centred object and a group of the same need no place in words.
    silent = different < count or kind == "relation" or (count == 1 and cells[0][0] == "centre")
    objects = tuple(
        Placed(concept, "" if silent else position, _square(cell, bucket), size)
        for concept, (position, cell) in zip(chosen * (count // different), cells)
    )
    relation = RELATIONS[cells[0][0]] if kind == "relation" else ""
    return Scene(bucket, background, objects, relation)


def held_out(scene: Scene) -> bool:
    """Whether a combination of the scene is one that training never sees; the same on every machine."""
    return scene.name_background and any(map(_unlucky, combinations(scene)))


def combinations(scene: Scene) -> list[tuple[str, ...]]:
    """What the scene combines: each pair of concepts, a concept so many times or on a background, and the word."""
    ids = [placed.concept.id for placed in scene.objects]
    keys = []
    if scene.word:
        keys.append(("word", scene.word.text))
    if len(ids) == 1:
        keys.append(("one", ids[0], scene.background))
    elif len(set(ids)) == 1:
        keys.append(("same", ids[0], str(len(ids))))
    else:
        keys += [("pair", *sorted((a, b))) for i, a in enumerate(ids) for b in ids[:i]]
    return keys


def _unlucky(key: tuple[str, ...]) -> bool:
    return hashlib.blake2b("|".join(key).encode(), digest_size=4).digest()[0] % HELD_OUT == 0


def _with_word(rng: np.random.Generator, chosen: Sequence[Concept], background: str, bucket: Bucket) -> Scene:
    position = ("top", "bottom")[rng.integers(2)] if chosen or rng.random() < 0.3 else ""
    fonts = list(lettering.FONTS)
    text = lettering.random_word(rng)
    word = Word(text, fonts[rng.integers(len(fonts))], position, _word_box(len(text), position, bucket))
    objects = ()
    if chosen:
        objects = (Placed(chosen[0], "", _square(_scaled(BESIDE_WORD[position], bucket), bucket)),)
    return Scene(bucket, background, objects, word=word)


def _word_box(letters: int, position: str, bucket: Bucket) -> Box:
    """Squares of 16 pixels for the letters where the image is wide enough for them, and of 8 elsewhere.

    One square of the grid from the left edge, so that a place in a word is a place in the image, however long it is.
    """
    side = 2 * GRID if GRID + letters * 2 * GRID <= bucket.width else GRID
    y = min(max(_on_grid(WORD_MIDDLE[position] * bucket.height - side / 2), 0), bucket.height - side)
    return (GRID, y, GRID + letters * side, y + side)


def _layout(rng: np.random.Generator, count: int, same: bool, bucket: Bucket, size: str) -> str:
    if count == 1:
        if size == "large":
            return "large"
        place = rng.choice(["", "left", "right", "top", "bottom"], p=[0.6, 0.1, 0.1, 0.1, 0.1])
        return f"small {place}".strip() if size else place or "centre"
    wide = bucket.width >= bucket.height
    elongation = max(bucket.width / bucket.height, bucket.height / bucket.width)
    # Objects side by side across the short side of a long image would be too small to recognise.
    if count == 2:
        options = ["halves", "stack"] if elongation < 1.25 and not same else ["halves" if wide else "stack"]
    elif count == 3:
        # What no caption says is the same for all: a model need not agree with itself on it.
        options = ["pyramid"] if same else ["pyramid", "wedge"]
        if elongation >= 1.6:
            options = ["row" if wide else "column"]
    else:
        options = ["corners"]
    return options[rng.integers(len(options))]


def _cells(layout: str, bucket: Bucket) -> list[tuple[str, Cell]]:
    return [(position, _scaled(cell, bucket)) for position, cell in LAYOUTS[layout].items()]


def _scaled(cell: Cell, bucket: Bucket) -> Cell:
    scale = (bucket.width, bucket.height, bucket.width, bucket.height)
    return tuple(fraction * side for fraction, side in zip(cell, scale))


def large_side(height: int, width: int) -> int:
    """Side of the square of a large object, pixels."""
    return LARGE if min(height, width) >= NARROW else LARGE_IN_NARROW


def _square(cell: Cell, bucket: Bucket) -> Box:
    """The square of an object in a cell: the larger of the two that it has room for, on the grid, less a pixel."""
    left, top, right, bottom = cell
    large = large_side(bucket.height, bucket.width)
    # Two pixels over the cell are no matter: the pixel on each side is left free.
    side = large if min(right - left, bottom - top) + 2 >= large else SMALL
    x, y = _on_grid((left + right - side) / 2), _on_grid((top + bottom - side) / 2)
    x, y = min(max(x, 0), bucket.width - side), min(max(y, 0), bucket.height - side)
    return (x + 1, y + 1, x + side - 1, y + side - 1)


def _on_grid(pixels: float) -> int:
    """Rounded to the grid; the half goes up."""
    return int(pixels / GRID + 0.5) * GRID
