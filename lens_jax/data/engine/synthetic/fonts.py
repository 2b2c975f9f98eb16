"""Font files: which can be used, what they cover, and what they are called.

Files may come from anywhere: what cannot be used is a `Refused` with its reason, never an exception of a parser.
"""

import functools
import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lens_jax.errors import LensError

ENDINGS = (".ttf", ".otf", ".ttc", ".otc")
# The largest in use, of Chinese, Japanese and Korean together, have about 30 MB.
MAX_BYTES = 128 << 20
# Letters that are drawn once to see whether they can be.
_SAMPLED = 32
# Name table entries, as OpenType numbers them.
_FAMILY, _STYLE, _LICENCE, _LICENCE_URL = 1, 2, 13, 14


@dataclass(frozen=True)
class Refused:
    """Something that was given to draw with and cannot be used."""

    name: str
    # One of a few fixed reasons, for counting.
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Font:
    """One face of a font file."""

    path: str
    # Which face of a collection.
    index: int
    # As the file names them: "Noto Sans", "Bold Italic".
    family: str
    style: str
    # The address of its licence, or how the licence begins; empty where the file says nothing.
    licence: str
    # sha256 of the file.
    digest: str
    # Code points it has glyphs for.
    letters: frozenset[int] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.family if self.style in ("", "Regular") else f"{self.family} {self.style}"


def load_fonts(patterns: Sequence[str]) -> tuple[tuple[Font, ...], tuple[Refused, ...]]:
    """The faces of files, of all font files below folders, and of patterns of either; and what cannot be used.

    In the order of their paths. LensError where a pattern matches nothing.
    """
    fonts, refused = [], []
    for path in _files(patterns):
        found = _load(path)
        (refused if isinstance(found, Refused) else fonts).extend([found] if isinstance(found, Refused) else found)
    # Faces of a collection cover the same: one set for all of them.
    sets: dict[frozenset[int], frozenset[int]] = {}
    shared = tuple(
        Font(f.path, f.index, f.family, f.style, f.licence, f.digest, sets.setdefault(f.letters, f.letters))
        for f in fonts
    )
    return shared, tuple(refused)


def _files(patterns: Sequence[str]) -> list[str]:
    found = set()
    for pattern in patterns:
        given = os.path.expanduser(pattern)
        # A path that is there is meant as it is: names of variable fonts have brackets in them.
        matches = [given] if os.path.exists(given) else glob.glob(given, recursive=True)
        if not matches:
            raise LensError(f"synthetic.fonts: {pattern!r:.200}: no such file or folder, and a pattern that fits none")
        for match in matches:
            if not os.path.isdir(match):
                found.add(match)
                continue
            for folder, _, names in os.walk(match):
                found.update(os.path.join(folder, name) for name in names if name.lower().endswith(ENDINGS))
    return sorted(found)


def _load(path: str) -> list[Font] | Refused:
    import uharfbuzz

    name = path.encode("utf-8", "replace").decode()
    try:
        if not os.path.isfile(path):
            return Refused(name, "unreadable font", "not a file")
        if os.path.getsize(path) > MAX_BYTES:
            return Refused(name, "unreadable font", f"over {MAX_BYTES} bytes")
        data = Path(path).read_bytes()
    except OSError as error:
        return Refused(name, "unreadable font", error.strerror or str(error))
    digest = hashlib.sha256(data).hexdigest()
    blob = uharfbuzz.Blob(data)
    fonts = []
    # Of what is no font HarfBuzz makes an empty face.
    for index in range(uharfbuzz.Face(blob).count or 1):
        face = uharfbuzz.Face(blob, index)
        letters = frozenset(face.unicodes)
        if not face.glyph_count or not letters:
            return Refused(name, "unreadable font", "no OpenType font with glyphs of characters")
        if reason := _cannot_draw(path, index, letters):
            return Refused(name, "unreadable font", reason)
        licence = _said(face, _LICENCE_URL) or _said(face, _LICENCE).partition(".")[0]
        family = _said(face, _FAMILY) or Path(name).stem
        fonts.append(Font(path, index, family, _said(face, _STYLE), licence, digest, letters))
    return fonts


def _cannot_draw(path: str, index: int, letters: frozenset[int]) -> str:
    """Why FreeType refuses a face, as it does one of coloured bitmaps alone or one that ends early, or that it has
    nothing to show; empty where neither."""
    from PIL import ImageFont

    try:
        face = ImageFont.truetype(path, 32, index, layout_engine=ImageFont.Layout.BASIC)
        ordered = sorted(letters)
        seen = [face.getmask(chr(code)).getbbox() for code in ordered[:: max(1, len(ordered) // _SAMPLED)]]
    except (OSError, ValueError, MemoryError) as error:
        return str(error)[:120]
    return "" if any(seen) else "its glyphs are empty"


def _said(face, entry: int) -> str:
    """An entry of the name table in printable characters, at most 80 of them."""
    try:
        text = face.get_name(entry) or ""
    except (UnicodeDecodeError, ValueError):
        return ""
    return "".join(letter for letter in text if letter.isprintable()).strip()[:80]


@functools.lru_cache(maxsize=256)
def drawn_at(path: str, index: int, size: int):
    """PIL's font of a face, `size` pixels to the em, laid out by raqm where there is that."""
    from PIL import ImageFont

    return ImageFont.truetype(path, size, index, layout_engine=ImageFont.Layout.RAQM)
