"""A block of text as masks: broken into lines, drawn, turned and seen from an angle."""

import math
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np

from lens_jax.data.engine.synthetic.fonts import Font, drawn_at
from lens_jax.data.engine.synthetic.shaping import can_shape, is_right_to_left

MAX_LINES = 7
# Least part of the ink that lies in pixels at least half covered: less, and what is drawn is a haze that no colour
# makes legible, as hairlines are at small sizes. Text has 0.7 and more.
_SOLID = 0.45
# Most that an outline may have of the area of its letters: around thin ones it would be all that is seen.
_OUTLINED = 2.2


@dataclass(frozen=True)
class Look:
    """How a block is drawn, in pixels and degrees."""

    # Of the em.
    size: int
    # Widest line.
    width: int
    # Counterclockwise.
    angle: float = 0.0
    # How far each corner is moved, as parts of the block's height: float [4, 2], or none.
    corners: np.ndarray | None = None
    # Width of the outline around letters.
    outline: int = 0
    # Room of the panel behind the text.
    panel: int = 0
    # Standard deviation of the blur of letters.
    blur: float = 0.0
    align: str = "left"


@dataclass(frozen=True)
class Masks:
    """Images of PIL, mode L, of one size: how much of each pixel is covered."""

    ink: Any
    outline: Any | None
    panel: Any | None
    lines: tuple[str, ...]
    # Of the letters, as in `Look`, or 0 where they would be lost in it.
    blur: float


def draw_block(text: str, font: Font, look: Look, breakable: bool) -> Masks | None:
    """The masks of a text, cut to what they cover; None where it takes too many lines, or leaves no ink that could be
    seen.

    text: one paragraph in logical order. Its lines are shaped and put in visual order by raqm.
    """
    from PIL import Image, ImageDraw, ImageFilter

    face = drawn_at(font.path, font.index, look.size)
    lines = _break(text, face, look.width) if breakable else [text]
    if len(lines) > MAX_LINES:
        return None
    # The direction is that of the paragraph: a line of it that begins with a number is no other.
    given = {"direction": "rtl" if is_right_to_left(text) else "ltr"} if can_shape() else {}
    lengths = [face.getlength(line, **given) for line in lines]
    if max(lengths) > look.width:
        return None
    ascent, descent = face.getmetrics()
    step = max(round(1.2 * look.size), ascent + descent)
    # Letters may reach beyond their length and their line, as italics and tall scripts do.
    pad = look.size // 2 + look.outline + look.panel + math.ceil(3 * look.blur)
    size = (math.ceil(max(lengths)) + 2 * pad, step * (len(lines) - 1) + ascent + descent + 2 * pad)
    ink = Image.new("L", size)
    outline = Image.new("L", size) if look.outline else None
    share = {"left": 0.0, "centre": 0.5, "right": 1.0}[look.align]
    for number, (line, length) in enumerate(zip(lines, lengths)):
        corner = (pad + share * (max(lengths) - length), pad + ascent + step * number)
        options = {"fill": 255, "font": face, "anchor": "ls", **given}
        ImageDraw.Draw(ink).text(corner, line, **options)
        if outline:
            ImageDraw.Draw(outline).text(corner, line, stroke_width=look.outline, **options)
    covered = ink.getbbox()
    if covered is None:
        return None
    panel = None
    if look.panel:
        panel = Image.new("L", size)
        left, top, right, bottom = covered
        room = (left - look.panel, top - look.panel, right + look.panel, bottom + look.panel)
        ImageDraw.Draw(panel).rounded_rectangle(room, radius=look.panel * 0.6, fill=255)
    if outline and _amount(outline) > _OUTLINED * _amount(ink):
        outline = None
    blurred = ink.filter(ImageFilter.GaussianBlur(look.blur)) if look.blur else ink
    blur = look.blur if _is_solid(blurred) else 0.0
    if blur:
        ink, outline = blurred, outline and outline.filter(ImageFilter.GaussianBlur(blur))
    # Without the room that was left for what reaches far: turning costs by the pixel.
    room = _union([layer.getbbox() for layer in (ink, outline, panel) if layer])
    layers = [layer and layer.crop(room) for layer in (ink, outline, panel)]
    if look.angle or look.corners is not None:
        layers = _warp(layers, look)
    if not _is_solid(layers[0]):
        return None
    box = _union([layer.getbbox() for layer in layers if layer])
    return Masks(*(layer and layer.crop(box) for layer in layers), lines=tuple(lines), blur=blur)


def _is_solid(ink) -> bool:
    counts = np.array(ink.histogram()) * np.arange(256)
    return counts[128:].sum() >= _SOLID * max(counts.sum(), 1)


def _amount(mask) -> int:
    return int(np.array(mask.histogram()) @ np.arange(256))


def _break(text: str, face, width: int) -> list[str]:
    """Lines no wider than `width` where that can be: between words, and between the letters of scripts without spaces.

    A single word that is wider makes a line of its own.
    """
    lines, line = [], ""
    for piece in _pieces(text):
        if line and face.getlength((line + piece).strip()) > width:
            lines.append(line.strip())
            line = ""
        line += piece
    return [*lines, line.strip()] if line.strip() else lines


def _pieces(text: str) -> list[str]:
    """What may stand at the end of a line, with the space behind it."""
    pieces, piece = [], ""
    for i, letter in enumerate(text):
        piece += letter
        following = text[i + 1 : i + 2]
        if not following or following == " ":
            continue
        # Not before closing marks nor behind opening ones.
        apart = _is_wide(letter) and not unicodedata.category(following).startswith(("P", "M"))
        if letter == " " or (apart and unicodedata.category(letter) != "Ps"):
            pieces.append(piece)
            piece = ""
    return [*pieces, piece]


def _is_wide(letter: str) -> bool:
    name = unicodedata.name(letter, "")
    return name.startswith(("CJK UNIFIED", "HIRAGANA", "KATAKANA")) or letter in "。、！？」』）"


def _warp(layers: list, look: Look) -> list:
    """The layers turned by the look's angle, with their corners moved, each in one resampling."""
    from PIL import Image

    width, height = next(layer for layer in layers if layer).size
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], float)
    turn = math.radians(look.angle)
    # The y axis points down, so this turns counterclockwise.
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    moved = (corners - corners.mean(0)) @ rotation.T
    if look.corners is not None:
        moved = moved + look.corners * height
    moved -= moved.min(0)
    size = tuple(int(side) for side in np.ceil(moved.max(0)))
    coefficients = _homography(moved, corners)
    return [
        layer and layer.transform(size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)
        for layer in layers
    ]


def _homography(source: np.ndarray, target: np.ndarray) -> tuple[float, ...]:
    """The eight numbers of the perspective that takes four points to four others, as PIL wants them."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source, target):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return tuple(float(value) for value in np.linalg.solve(np.array(rows), np.array(values)))


def _union(boxes: list) -> tuple[int, int, int, int]:
    boxes = np.array([box for box in boxes if box])
    return (*map(int, boxes[:, :2].min(0)), *map(int, boxes[:, 2:].max(0)))
