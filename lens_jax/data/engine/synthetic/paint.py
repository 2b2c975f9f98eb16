"""A block's masks onto an image, in colours that can be read there: chosen by contrast, and measured once they lie."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lens_jax.data.engine.synthetic.block import Masks
from lens_jax.data.engine.synthetic.colours import (
    Colour,
    contrast,
    draw_colour,
    luminance,
    luminance_image,
    near,
    tenth,
)

# Colours tried before black or white is taken.
_TRIES = 8
# Chosen above what is asked for: edges and blur take some of it.
_MARGIN = 1.4
# Pixels of a background that are looked at, a side.
_PROBED = 48
# Pixels of letters that are too few to be judged by themselves.
_FEW = 12


@dataclass(frozen=True)
class Paint:
    """The colours of a block."""

    ink: Colour
    outline: Colour | None = None
    panel: Colour | None = None
    # Whether the panel is the whole box, upright, and not the mask.
    upright: bool = False


def lay_on(
    rng: np.random.Generator, canvas, masks: Masks, box: tuple, size: int, shadow: tuple[int, int] | None, least: float
) -> Paint:
    """Draws a block on `canvas`, an image of PIL of mode RGB, at `box`; returns how.

    size: pixels of the em. shadow: how far it is moved. least: contrast that is reached, see `legibility`: where no
    colour does, by a panel behind the text.
    """
    room = 3 * max(map(abs, shadow)) if shadow else 0
    around = (
        max(box[0] - room, 0),
        max(box[1] - room, 0),
        min(box[2] + room, canvas.width),
        min(box[3] + room, canvas.height),
    )
    before = canvas.crop(around)
    inside = (box[0] - around[0], box[1] - around[1], box[2] - around[0], box[3] - around[1])
    for paint in _paints(rng, before.crop(inside), masks, least):
        region = before.copy()
        _apply(region, paint, masks, inside[:2], shadow)
        reached = legibility(region.crop(inside), masks.ink, size)
        if reached >= least:
            break
    canvas.paste(region, around[:2])
    return paint


def legibility(image, ink, size: int) -> float:
    """The contrast ratio that nine in ten of the letters' inner pixels have with what is around them, and half of them
    in every stretch of an em.

    image: of PIL, mode RGB, as it was drawn; ink: mode L, of the same size, what of it is letters. Around is what lies
    within a sixth of an em and is no letter. 1 where there is no ink, or only ink.
    """
    from PIL import ImageChops, ImageFilter

    light, bare = luminance_image(image), ImageChops.invert(ink)
    around = ImageFilter.BoxBlur(max(2, size // 6))
    weight = np.asarray(bare.filter(around), np.float32)
    lit = np.asarray(ImageChops.multiply(light, bare).filter(around), np.float32)
    covered = np.asarray(ink)
    core = (covered >= 0.8 * covered.max()) & (weight >= 8) & (covered > 0)
    if not core.any():
        return 1.0
    found = contrast(np.asarray(light, np.float32)[core] / 255, np.minimum(lit[core] / weight[core], 1))
    # A letter or two that cannot be read are few pixels of a long line: no stretch of an em may be so by half.
    stretch = np.nonzero(core)[1] // max(size, 8)
    ordered = found[np.argsort(stretch, kind="stable")]
    parts = np.split(ordered, np.cumsum(np.bincount(stretch))[:-1])
    return min([tenth(found), *(float(np.median(part)) for part in parts if len(part) >= _FEW)])


def _paints(rng: np.random.Generator, behind, masks: Masks, least: float) -> Iterator[Paint]:
    """Colours to try: any that stand out, then black or white, then on a panel of the other."""
    small = behind.resize((min(behind.width, _PROBED), min(behind.height, _PROBED)))
    light = luminance(np.asarray(small)).ravel()
    wanted = _MARGIN * least
    if masks.panel is not None:
        panel = draw_colour(rng)
        ink = _standing_out(rng, np.array([panel.luminance]), wanted)
        yield Paint(ink, _outline(rng, ink, masks), panel)
    else:
        ink = _standing_out(rng, light, wanted)
        yield Paint(ink, _outline(rng, ink, masks))
    ink = _extreme(rng, light)
    yield Paint(ink, _outline(rng, ink, masks))
    panel = near("white" if ink.name == "black" else "black", rng)
    yield Paint(ink, None, panel, upright=True)


def _standing_out(rng: np.random.Generator, light: np.ndarray, wanted: float) -> Colour:
    """A colour whose contrast with nine in ten of these luminances is what is wanted."""
    for _ in range(_TRIES):
        colour = draw_colour(rng)
        if tenth(contrast(colour.luminance, light)) >= wanted:
            return colour
    return _extreme(rng, light)


def _extreme(rng: np.random.Generator, light: np.ndarray) -> Colour:
    black, white = near("black", rng), near("white", rng)
    reached = lambda colour: tenth(contrast(colour.luminance, light))
    return black if reached(black) > reached(white) else white


def _outline(rng: np.random.Generator, ink: Colour, masks: Masks) -> Colour | None:
    return _standing_out(rng, np.array([ink.luminance]), 3.0) if masks.outline is not None else None


def _apply(region, paint: Paint, masks: Masks, at: tuple[int, int], shadow: tuple[int, int] | None) -> None:
    from PIL import Image, ImageFilter

    if paint.panel and paint.upright:
        region.paste(paint.panel.rgb, (*at, at[0] + masks.ink.width, at[1] + masks.ink.height))
    elif paint.panel:
        region.paste(paint.panel.rgb, at, masks.panel)
    outline = masks.outline if paint.outline else None
    if shadow:
        cast = Image.new("L", region.size)
        cast.paste(outline or masks.ink, (at[0] + shadow[0], at[1] + shadow[1]))
        cast = cast.filter(ImageFilter.GaussianBlur(max(1.0, 0.5 * shadow[1]))).point(lambda value: value * 0.6)
        region.paste((0, 0, 0), (0, 0), cast)
    if outline:
        region.paste(paint.outline.rgb, at, outline)
    region.paste(paint.ink.rgb, at, masks.ink)
