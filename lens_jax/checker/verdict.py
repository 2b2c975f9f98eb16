"""Does an image show what its scene asks for? One answer for each thing asked."""

from collections import Counter

import numpy as np

from lens_jax.checker.look import Found, Seen, look
from lens_jax.checker.references import References
from lens_jax.data import scene_sampler
from lens_jax.data.scenes import Scene

# objects     every concept as often as asked, nothing else
# count       as many objects as asked, whatever they are
# place       each object, and the word, where asked
# relation    the first object on the side of the second that is asked
# size        small or large, as asked
# background  its colour
# word        the word, letter by letter, and no other
CRITERIA = ("objects", "count", "place", "relation", "size", "background", "word")

# A centre this far from the middle of the image, as a part of its side, is left, right, top or bottom. In scenes those
# lie at least 0.17 from it.
_ASIDE = 0.07
# Least distance of two centres for a relation, as a part of the side. In scenes it is 0.4 and more.
_APART = 0.12
# Pixels around the mean of the two sides that scenes have, where an object is neither small nor large.
_NEITHER = 2


def judge(scene: Scene, image: np.ndarray, references: References | None = None) -> dict[str, bool]:
    """Verdicts on a uint8 [H, W, 3] image by those of CRITERIA that the scene has, as `verdict`.

    `references` are those of all concepts unless given; they are drawn once a process.
    """
    return verdict(scene, look(image, references))


def verdict(scene: Scene, seen: Seen) -> dict[str, bool]:
    """Verdicts by those of CRITERIA that the scene has, in their order; `objects` and `count` are always among them."""
    asked = Counter(placed.concept.id for placed in scene.objects)
    words = [word.text for word in seen.words]
    stray = bool(words) and not scene.word
    results = {
        "objects": asked == Counter(found.concept for found in seen.objects) and not stray,
        "count": len(scene.objects) == len(seen.objects),
    }
    placed = [one for one in scene.objects if one.position]
    if placed or (scene.word and scene.word.position):
        fits = [any(at(found, one.position, seen) for found in _of(one.concept.id, seen)) for one in placed]
        if scene.word and scene.word.position:
            fits.append(any(at(word, scene.word.position, seen) for word in seen.words))
        results["place"] = all(fits)
    if scene.relation:
        first, second = (_of(one.concept.id, seen) for one in scene.objects)
        results["relation"] = any(related(a, b, scene.relation, seen) for a in first for b in second)
    if sized := [one for one in scene.objects if one.size]:
        results["size"] = all(
            any(size_of(found, seen) == one.size for found in _of(one.concept.id, seen)) for one in sized
        )
    if scene.name_background:
        results["background"] = seen.background == scene.background
    if scene.word:
        results["word"] = words == [scene.word.text]
    return results


def _of(concept: str, seen: Seen) -> list[Found]:
    return [found for found in seen.objects if found.concept == concept]


def at(found, position: str, seen: Seen) -> bool:
    """Whether the centre of a found object or word is at a position: "left", "top_right", "centre", ..."""
    x, y = _from_middle(found.box, seen)
    sides = {"left": x < -_ASIDE, "right": x > _ASIDE, "top": y < -_ASIDE, "bottom": y > _ASIDE}
    if position == "centre":
        return abs(x) <= 2 * _ASIDE and abs(y) <= 2 * _ASIDE
    return all(sides[side] for side in position.split("_"))


def related(first: Found, second: Found, relation: str, seen: Seen) -> bool:
    """Whether the first is "left_of", "right_of", "above" or "below" the second, more than it is on another side."""
    (x, y), (other_x, other_y) = _from_middle(first.box, seen), _from_middle(second.box, seen)
    across, down = other_x - x, other_y - y
    if relation in ("left_of", "right_of"):
        along, other = (across if relation == "left_of" else -across), down
    else:
        along, other = (down if relation == "above" else -down), across
    return along >= _APART and along >= abs(other)


def size_of(found: Found, seen: Seen) -> str:
    """ "small", "large" or "" between them, by the sides that scenes of this size have."""
    middle = (scene_sampler.SMALL + scene_sampler.large_side(seen.height, seen.width)) / 2
    return "small" if found.side < middle - _NEITHER else "large" if found.side > middle + _NEITHER else ""


def _from_middle(box, seen: Seen) -> tuple[float, float]:
    left, top, right, bottom = box
    return (left + right) / (2 * seen.width) - 0.5, (top + bottom) / (2 * seen.height) - 0.5
