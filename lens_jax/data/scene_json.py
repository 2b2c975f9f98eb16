"""Scenes as plain JSON, and back: what prompt sets and the figures of the scene benchmark hold of them.

{"bucket": {"height": 64, "width": 64}, "background": "pink", "relation": "", "name_background": true,
 "objects": [{"concept": "fox", "position": "left", "box": [2, 18, 31, 47], "size": ""}, ...],
 "word": {"text": "TEA", "font": "roboto", "position": "top", "box": [4, 3, 60, 21]} or null}
"""

import dataclasses
import typing
from collections.abc import Collection, Mapping
from typing import Any

from lens_jax.data import lettering
from lens_jax.data.buckets import Bucket
from lens_jax.data.scene_sampler import LAYOUTS
from lens_jax.data.scenes import COLOURS, Box, Concept, Placed, Relation, Scene, Word
from lens_jax.errors import LensError, nearest

_POSITIONS = {"", *(position for layout in LAYOUTS.values() for position in layout)}
# No image of this world is as large, and no scene has as many objects.
_MOST_PIXELS, _MOST_OBJECTS = 4096, 64


def to_json(scene: Scene) -> dict[str, Any]:
    """The scene as plain values, its concepts by their ids."""
    values = dataclasses.asdict(scene)
    for placed in values["objects"]:
        placed |= {"concept": placed["concept"]["id"], "box": list(placed["box"])}
    if values["word"]:
        values["word"]["box"] = list(values["word"]["box"])
    return {**values, "objects": list(values["objects"])}


def from_json(values: Any, concepts: Mapping[str, Concept], where: str) -> Scene:
    """The scene of what `to_json` gave.

    `concepts` by their ids are those it may show. LensError that starts with `where` and names the value that is not
    of a scene, and what would be.
    """
    values = _fields(values, Scene, where)
    bucket = _fields(values["bucket"], Bucket, f"{where}.bucket")
    for name, side in bucket.items():
        if type(side) is not int or not 1 <= side <= _MOST_PIXELS:
            raise LensError(f"{where}.bucket.{name} is {side!r:.40}; expected 1 to {_MOST_PIXELS} pixels")
    objects = values["objects"]
    if not isinstance(objects, list) or len(objects) > _MOST_OBJECTS:
        raise LensError(f"{where}.objects is {objects!r:.60}; expected a list of at most {_MOST_OBJECTS}")
    if type(values["name_background"]) is not bool:
        raise LensError(f"{where}.name_background is {values['name_background']!r:.40}; expected true or false")
    placed = tuple(_placed(one, concepts, f"{where}.objects[{i}]") for i, one in enumerate(objects))
    relation = _one_of(values["relation"], typing.get_args(Relation), f"{where}.relation")
    if relation and len(placed) != 2:
        raise LensError(f"{where}.relation is {relation!r}, which is of two objects; there are {len(placed)}")
    return Scene(
        Bucket(**bucket),
        _one_of(values["background"], COLOURS, f"{where}.background"),
        placed,
        relation,
        None if values["word"] is None else _word(values["word"], f"{where}.word"),
        values["name_background"],
    )


def _placed(values: Any, concepts: Mapping[str, Concept], where: str) -> Placed:
    values = _fields(values, Placed, where)
    return Placed(
        concepts[_one_of(values["concept"], concepts, f"{where}.concept")],
        _one_of(values["position"], _POSITIONS, f"{where}.position"),
        _box(values["box"], f"{where}.box"),
        _one_of(values["size"], ("", "small", "large"), f"{where}.size"),
    )


def _word(values: Any, where: str) -> Word:
    values = _fields(values, Word, where)
    text = values["text"]
    if not isinstance(text, str) or not (text.isascii() and text.isalpha() and text.isupper() and len(text) <= 64):
        raise LensError(f"{where}.text is {text!r:.60}; expected capital letters A to Z")
    return Word(
        text,
        _one_of(values["font"], lettering.FONTS, f"{where}.font"),
        _one_of(values["position"], ("", "top", "bottom"), f"{where}.position"),
        _box(values["box"], f"{where}.box"),
    )


def _fields(values: Any, kind: type, where: str) -> dict[str, Any]:
    """The values, which have just the fields of the dataclass."""
    names = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(values, Mapping):
        raise LensError(f"{where} is {values!r:.60}; expected an object with {', '.join(names)}")
    for name in values:
        if name not in names:
            raise LensError(f"{where}: unknown field {name!r:.40}{nearest(str(name), names)}")
    if missing := [name for name in names if name not in values]:
        raise LensError(f"{where}: no {', '.join(missing)}; expected {', '.join(names)}")
    return dict(values)


def _one_of(value: Any, accepted: Collection[str], where: str) -> str:
    if not isinstance(value, str) or value not in accepted:
        close = nearest(value, accepted) if isinstance(value, str) else ""
        listed = ", ".join(repr(one) for one in sorted(accepted)[:12]) + (", ..." if len(accepted) > 12 else "")
        raise LensError(f"{where} is {value!r:.40}{close}; accepted: {listed}")
    return value


def _box(values: Any, where: str) -> Box:
    if not isinstance(values, list) or len(values) != 4 or not all(type(v) is int for v in values):
        raise LensError(f"{where} is {values!r:.60}; expected left, top, right and bottom in pixels")
    return tuple(values)
