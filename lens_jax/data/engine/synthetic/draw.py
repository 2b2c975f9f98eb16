"""`synthesize`: an image with text on it and its caption, from a seed and a number (report, section 1)."""

import math

import numpy as np

from lens_jax import __version__
from lens_jax.data.buckets import Bucket
from lens_jax.data.engine.synthetic.block import Look, Masks, draw_block
from lens_jax.data.engine.synthetic.fonts import Font
from lens_jax.data.engine.synthetic.materials import Materials
from lens_jax.data.engine.synthetic.paint import lay_on
from lens_jax.data.engine.synthetic.shaping import covers
from lens_jax.data.engine.synthetic.strings import String
from lens_jax.data.engine.synthetic.written import Written, make_caption
from lens_jax.data.images import encode_image
from lens_jax.data.records import Record
from lens_jax.errors import LensError

SOURCE = "synthetic"
# Contrast of letters with what is around them, where nine in ten of their pixels lie above it.
LEAST_CONTRAST = {"augmented": 1.5, "plain": 4.5}
_STRINGS_TRIED = 60
_PLACES_TRIED = 12
_SIZES_TRIED = 6


def synthesize(seed: int, index: int, materials: Materials) -> Record:
    """Image `index` of `seed`: a pure function, the same bytes in whatever order or process, for the same versions of
    Pillow and NumPy.

    One to four blocks of text that do not overlap, on a background; the caption in English quotes each. `meta` has the
    strings ("text"), their fonts with the licences, and boxes (left, top, right, bottom, in pixels), in one order.
    LensError where no font has the letters of the strings.
    """
    rng = np.random.default_rng([seed, index])
    shape = materials.shapes[rng.integers(len(materials.shapes))]
    plain = materials.style == "plain"
    behind = materials.backgrounds.draw(rng, shape, blur=not plain)
    canvas, blocks = behind.image, []
    for _ in range(1 if plain else int(rng.choice([1, 2, 3, 4], p=[0.35, 0.3, 0.2, 0.15]))):
        block = _write(rng, canvas, shape, materials, [block.box for block in blocks])
        if block:
            blocks.append(block)
    pixels = np.asarray(canvas)
    return Record(
        image=encode_image(pixels, materials.encoding),
        captions={"en": (make_caption(rng, shape, blocks, behind),)},
        height=shape.height,
        width=shape.width,
        source=f"{SOURCE}/{seed}/{index:012d}",
        licence=behind.licence or "generated",
        meta={
            "text": [block.text for block in blocks],
            "fonts": [block.font.name for block in blocks],
            "font_licences": [block.font.licence for block in blocks],
            "boxes": [list(block.box) for block in blocks],
            "background": behind.source,
            "problems": [str(problem) for problem in behind.problems],
            "engine": f"lens-jax {__version__}",
        },
    )


def _write(rng, canvas, shape: Bucket, materials: Materials, taken: list) -> Written | None:
    """Draws a block on the canvas, apart from the boxes that are taken. None where there is no room left for one;
    the first always has some."""
    for _ in range(_STRINGS_TRIED):
        string = materials.strings.draw(rng)
        font = _font_for(rng, string.text, materials.fonts)
        if font is None:
            continue
        found = _fit(rng, string, font, shape, materials.style == "plain", taken)
        if found is not None:
            return _paint(rng, canvas, shape, materials.style, string, font, *found)
        if taken:
            return None
    raise LensError(
        f"images of text: of {_STRINGS_TRIED} strings none could be written, the last one {string.text!r:.60}: "
        f"none of {len(materials.fonts)} fonts has its letters, or it is too long for {shape}"
    )


def _font_for(rng: np.random.Generator, text: str, fonts: tuple[Font, ...]) -> Font | None:
    for number in rng.permutation(len(fonts)):
        if covers(fonts[number], text):
            return fonts[number]
    return None


def _fit(rng, string: String, font: Font, shape: Bucket, plain: bool, taken: list) -> tuple[Look, Masks, tuple] | None:
    """A size and a place where the text fits: smaller until it does."""
    side = math.sqrt(shape.height * shape.width)
    least = max(0.03 * side, 13)
    share = rng.uniform(0.06, 0.12) if plain else math.exp(rng.uniform(math.log(0.04), math.log(0.24)))
    size = max(share * side, least)
    width = rng.uniform(0.4, 0.92) * shape.width
    turned, seen_from = (False, False) if plain else (rng.random() < 0.5, rng.random() < 0.2)
    angle = float(rng.uniform(-25, 25)) if turned else 0.0
    corners = rng.uniform(-0.25, 0.25, (4, 2)) if seen_from else None
    chance = lambda share, low, high: 0.0 if plain or rng.random() >= share else rng.uniform(low, high)
    outline, panel, blur = chance(0.25, 0.02, 0.06), chance(0.15, 0.15, 0.5), chance(0.3, 0.01, 0.045)
    align = ("left", "centre", "right")[rng.integers(3)]
    breakable = string.kind == "words"
    margin, gap = round(0.015 * side), round(0.02 * side)
    for attempt in range(_SIZES_TRIED):
        last = attempt == _SIZES_TRIED - 1
        em = round(least if last else size)
        wide = int(0.94 * shape.width if last else max(width, size))
        look = Look(
            em, wide, angle, corners, math.ceil(outline * em) if outline else 0, round(panel * em), blur * em, align
        )
        masks = draw_block(string.text, font, look, breakable)
        if masks is not None:
            w, h = masks.ink.size
            free = (shape.width - w - 2 * margin, shape.height - h - 2 * margin)
            if min(free) >= 0:
                for _ in range(_PLACES_TRIED):
                    x, y = (int(margin + rng.integers(room + 1)) for room in free)
                    box = (x, y, x + w, y + h)
                    if not any(_overlap(box, other, gap) for other in taken):
                        return look, masks, box
        if em <= least and last:
            return None
        size, width = max(0.75 * size, least), min(1.15 * width, 0.94 * shape.width)
    return None


def _overlap(a: tuple, b: tuple, gap: int) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def _paint(rng, canvas, shape, style: str, string: String, font: Font, look: Look, masks: Masks, box: tuple) -> Written:
    """Lays the block on the canvas in colours that can be read there."""
    shadow = None
    if style != "plain" and rng.random() < 0.2:
        reach = max(1, round(0.06 * look.size))
        shadow = (int(rng.integers(-reach, reach + 1)), reach)
    paint = lay_on(rng, canvas, masks, box, look.size, shadow, LEAST_CONTRAST[style])
    return Written(
        text=string.text,
        kind=string.kind,
        font=font,
        box=box,
        lines=len(masks.lines),
        colour=paint.ink.name,
        outline=paint.outline.name if paint.outline and masks.outline else "",
        panel=paint.panel.name if paint.panel else "",
        size=look.size / math.sqrt(shape.height * shape.width),
        angle=look.angle,
        perspective=look.corners is not None,
        shadow=shadow is not None,
        blurred=masks.blur >= 0.025 * look.size,
    )
