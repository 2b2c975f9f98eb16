"""What was written on an image, and the caption that says so: true, since it is of what was drawn."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lens_jax.data.buckets import Bucket
from lens_jax.data.engine.synthetic.backgrounds import Background
from lens_jax.data.engine.synthetic.fonts import Font

# Parts of the side that an em must have to be called so.
_LARGE, _SMALL = 0.13, 0.05
_SLIGHT, _TURNED = 3.0, 10.0  # degrees
_NUMBERS = ("two", "three", "four", "five", "six", "seven")
# First words of Unicode's names of letters -> what a script is called; others are not named.
_SCRIPTS = {
    "ARABIC": "Arabic", "DEVANAGARI": "Devanagari", "CYRILLIC": "Cyrillic", "GREEK": "Greek", "HEBREW": "Hebrew",
    "THAI": "Thai", "HANGUL": "Korean", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "BENGALI": "Bengali",
    "TAMIL": "Tamil", "GEORGIAN": "Georgian", "ARMENIAN": "Armenian",
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A block of text on an image."""

    text: str
    # As `strings.String` has it.
    kind: str
    font: Font
    # Left, top, right, bottom, in pixels, without the shadow.
    box: tuple[int, int, int, int]
    lines: int
    # Names of colours; empty for none.
    colour: str
    outline: str
    panel: str
    # Of the em, as a part of the image's side.
    size: float
    # Counterclockwise, in degrees.
    angle: float
    perspective: bool
    shadow: bool
    # Enough to be seen.
    blurred: bool


def make_caption(rng: np.random.Generator, shape: Bucket, blocks: Sequence[Written], behind: Background) -> str:
    """One paragraph in English: every text in quotes, where and how it stands, and what is behind."""
    ordered = sorted(blocks, key=lambda block: (*_cell(block.box, shape)[::-1], block.box[1]))
    sentences = [_sentence(rng, block, shape) for block in ordered]
    if behind.description.startswith("plain"):
        scene = ("The background is {}.", "All of it stands on {}.", "Behind is nothing but {}.")
    elif behind.description.startswith("a gradient"):
        scene = ("The background is {}.", "Behind is {}.", "It stands on {}.")
    else:
        scene = ("The background is {}.", "Behind the text is {}.", "It is written over {}.")
    said = scene[rng.integers(3)].format(behind.description)
    if behind.caption:
        said = f"{said[:-1]}: {behind.caption.strip()}"
        said += "" if said[-1] in ".!?。" else "."
    return " ".join([said, *sentences] if rng.random() < 0.3 else [*sentences, said])


def _sentence(rng: np.random.Generator, block: Written, shape: Bucket) -> str:
    what = f"{_name(block)} {quote(block.text)}"
    how = f"in {_letters(block)}"
    extras = []
    if block.outline:
        extras.append(f"with {_a(block.outline)} outline")
    if block.shadow:
        extras.append("with a shadow")
    if block.panel:
        extras.append(f"on {_a(block.panel)} panel")
    if block.lines > 1:
        extras.append(f"on {_NUMBERS[block.lines - 2]} lines")
    if abs(block.angle) >= _SLIGHT:
        turned = "turned" if abs(block.angle) >= _TURNED else "turned slightly"
        extras.append(f"{turned} {'counterclockwise' if block.angle > 0 else 'clockwise'}")
    extras += ["seen at an angle"] * block.perspective + ["out of focus"] * block.blurred
    where, several = place(block.box, shape), block.kind == "words"
    if rng.random() < 0.5:
        return f"{_upper(what)} {'are' if several else 'is'} written {', '.join([how, *extras])}, {where}."
    verb = (("stand", "appear") if several else ("stands", "appears"))[rng.integers(2)]
    return f"{_upper(where)} {verb} {what} {', '.join([how, *extras])}."


def quote(text: str) -> str:
    """A text in quotes that it does not hold itself."""
    for opening, closing in ('""', "“”", "«»", "「」", "‹›"):
        if opening not in text and closing not in text:
            return f"{opening}{text}{closing}"
    return f'"{text}"'


def place(box: tuple[int, int, int, int], shape: Bucket) -> str:
    """Where a box is, by the third of the image that its centre lies in; what is wide has no left and right."""
    column, row = _cell(box, shape)
    if box[2] - box[0] > 0.6 * shape.width:
        return ("across the top", "across the middle", "across the bottom")[row]
    if column == 1:
        return ("at the top", "in the centre", "at the bottom")[row]
    side = ("left", "", "right")[column]
    return (f"at the top {side}", f"on the {side}", f"at the bottom {side}")[row]


def _cell(box: tuple[int, int, int, int], shape: Bucket) -> tuple[int, int]:
    x, y = (box[0] + box[2]) / 2 / shape.width, (box[1] + box[3]) / 2 / shape.height
    return min(int(3 * x), 2), min(int(3 * y), 2)


def _name(block: Written) -> str:
    """the Arabic words"""
    names = {unicodedata.name(letter, "").partition(" ")[0] for letter in block.text if letter.isalpha()}
    scripts = {_SCRIPTS[name] for name in names if name in _SCRIPTS}
    if names <= {"CJK", "HIRAGANA", "KATAKANA"} and "Japanese" in scripts:
        scripts = {"Japanese"}
    elif names == {"CJK"}:
        scripts = set()  # Chinese or Japanese: the letters alone do not tell
    script = f"{scripts.pop()} " if len(scripts) == 1 and len(names - {"CJK"}) <= 2 else ""
    return f"the {script}{block.kind}"


def _letters(block: Written) -> str:
    """large bold red serif letters"""
    style, family = block.font.style.lower(), block.font.family.lower()
    words = ["large"] * (block.size >= _LARGE) + ["small"] * (block.size <= _SMALL)
    words += ["bold"] * bool(re.search(r"\b(bold|black|heavy)\b", style))
    words += ["italic"] * bool(re.search(r"italic|oblique", style)) + [block.colour]
    words += ["serif"] * bool(re.search(r"\bserif\b", family))
    words.append("letters" if any(letter.isalpha() for letter in block.text) else "digits")
    return " ".join(words)


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
