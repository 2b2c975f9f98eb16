"""Which glyphs a text becomes in a font: whether all are there, and whether drawing it needs a shaping engine."""

import functools
import unicodedata
from typing import NamedTuple

from lens_jax.data.engine.synthetic.fonts import Font

# Joiners and selectors of variants: they choose glyphs and have none.
_WITHOUT_GLYPH = frozenset((0x200C, 0x200D, *range(0xFE00, 0xFE10)))
# Right to left by their classes, or written with marks; besides these, scripts that join letters without either.
_JOINING = ("MONGOLIAN", "PHAGS-PA", "DEVANAGARI", "BENGALI", "TAMIL", "KHMER", "MYANMAR", "TIBETAN", "SINHALA")


class Glyph(NamedTuple):
    """A glyph of a shaped text, from the left to the right as it is drawn."""

    number: int
    name: str
    # Index of the first character it stands for.
    cluster: int
    # How far it moves the pen, in units of the font.
    advance: int


def needs_shaping(text: str) -> bool:
    """Whether glyph after glyph of its letters would be wrong: right to left, with marks, or of letters that join."""
    return any(
        unicodedata.bidirectional(letter) in ("R", "AL", "AN")
        or unicodedata.category(letter) in ("Mn", "Mc", "Cf")
        or unicodedata.name(letter, "").startswith(_JOINING)
        for letter in text
        if ord(letter) > 0x2FF
    )


def can_shape() -> bool:
    """Whether PIL was built with raqm, which shapes and orders text."""
    from PIL import features

    return features.check("raqm")


def is_right_to_left(text: str) -> bool:
    """The direction of a paragraph: that of its first letter that has one."""
    for letter in text:
        kind = unicodedata.bidirectional(letter)
        if kind in ("R", "AL", "L"):
            return kind != "L"
    return False


def covers(font: Font, text: str) -> bool:
    """Whether every character has a glyph in the font and none is lost in shaping: no boxes will be drawn.

    Looked up first, since most fonts lack most scripts: a microsecond; shaping takes a hundred.
    """
    if not font.letters.issuperset({ord(letter) for letter in text} - _WITHOUT_GLYPH):
        return False
    return all(glyph.number for glyph in shape(font, text))


def shape(font: Font, text: str) -> list[Glyph]:
    """The glyphs of a text of one script, by HarfBuzz. Number 0 is the box of a missing one."""
    import uharfbuzz

    face = _hb_font(font.path, font.index)
    buffer = uharfbuzz.Buffer()
    buffer.add_str(text)
    buffer.guess_segment_properties()
    uharfbuzz.shape(face, buffer)
    return [
        Glyph(info.codepoint, face.glyph_to_string(info.codepoint), info.cluster, position.x_advance)
        for info, position in zip(buffer.glyph_infos, buffer.glyph_positions)
    ]


@functools.lru_cache(maxsize=512)
def _hb_font(path: str, index: int):
    import uharfbuzz

    return uharfbuzz.Font(uharfbuzz.Face(uharfbuzz.Blob.from_file_path(path), index))
