"""Images as files: PNGs that say how they were made, and contact sheets."""

import bisect
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

# An image on a sheet is enlarged by a whole factor until its longer side has at least this many pixels.
_SHEET_SIDE = 96
_LABEL_HEIGHT = 18
_GAP = 4
# Letters of a label that are looked for in a font; no sheet shows more.
_LOOKED_AT = 2000


def save_png(path: Path, image: Image.Image, metadata: Mapping[str, object]) -> None:
    """Write a PNG whose text chunks hold `metadata`: the key `lens-jax` as JSON, and the prompt by itself."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("lens-jax", json.dumps(dict(metadata), ensure_ascii=False))
    if "prompt" in metadata:
        info.add_itxt("prompt", str(metadata["prompt"]))
    temporary = path.with_name(path.name + ".partial")
    image.save(temporary, format="PNG", pnginfo=info)
    temporary.replace(path)


def read_png_metadata(path: Path) -> dict:
    """What `save_png` wrote."""
    with Image.open(path) as image:
        return json.loads(image.text["lens-jax"])


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str]) -> Image.Image:
    """Rows of uint8 images [H, W, 3], each row under its label. Small images are enlarged without smoothing."""
    rows = [[_enlarge(pixels) for pixels in row] for row in rows]
    columns = max(len(row) for row in rows)
    cell_widths = [max((row[c].width for row in rows if c < len(row)), default=0) for c in range(columns)]
    row_heights = [max(image.height for image in row) + _LABEL_HEIGHT for row in rows]
    # Several blocks of rows side by side, so that many prompts make no ribbon.
    block_width = max(sum(cell_widths) + _GAP * columns, 160) + 2 * _GAP
    blocks = max(1, min(len(rows), round(math.sqrt(sum(row_heights) / block_width))))
    per_block = math.ceil(len(rows) / blocks)
    heights = [sum(row_heights[i : i + per_block]) for i in range(0, len(rows), per_block)]
    sheet = Image.new("RGB", (block_width * len(heights), max(heights) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (row, label) in enumerate(zip(rows, labels)):
        block, place = divmod(i, per_block)
        left = block * block_width + _GAP
        top = sum(row_heights[block * per_block : block * per_block + place])
        label, font = _readable(label, i)
        draw.text((left, top + 2), _fitting(label, font, block_width - 2 * _GAP), fill="black", font=font)
        for image, cell in zip(row, cell_widths):
            sheet.paste(image, (left, top + _LABEL_HEIGHT))
            left += cell + _GAP
    return sheet


def slug(text: str, limit: int = 40) -> str:
    """A file name for a prompt: letters of any script and digits, dashes for the rest."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:limit].strip("-") or "prompt"


def _enlarge(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels)
    factor = max(1, math.ceil(_SHEET_SIDE / max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _readable(label: str, row: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The label and a font that has its letters: Pillow's own, Roboto where the extra demo is there, or a number."""
    for font in _fonts():
        if not any(_missing(font, letter) for letter in set(label[:_LOOKED_AT])):
            return label, font
    return f"row {row + 1}", _fonts()[0]


@functools.cache
def _fonts() -> tuple[ImageFont.FreeTypeFont, ...]:
    own = ImageFont.load_default(12)
    try:
        from font_roboto import Roboto  # Latin, Greek and Cyrillic
    except ImportError:
        return (own,)
    return own, ImageFont.truetype(Roboto, 12)


@functools.cache
def _missing(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether a font draws its sign for letters that it has not."""
    drawn, none = (font.getmask(text) for text in (letter, "\U0010fffd"))
    return letter.isprintable() and drawn.size == none.size and bytes(drawn) == bytes(none)


def _fitting(text: str, font, width: int) -> str:
    """The text on one line, cut with an ellipsis to the width in pixels."""
    # No more letters than pixels are looked at: what is measured does not grow with a prompt of any length.
    line = " ".join(text[: 4 * width].split())
    if len(text) <= 4 * width and font.getlength(line) <= width:
        return line
    fits = bisect.bisect_left(range(len(line)), True, key=lambda n: font.getlength(line[: n + 1] + "…") > width)
    return line[:fits] + "…"
