"""What is written: lines of the user's files, phrases of captions, words, numbers, prices and dates."""

import re
import string
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lens_jax.data.engine.synthetic.fonts import Refused
from lens_jax.data.engine.synthetic.locales import LOCALES
from lens_jax.data.engine.synthetic.shaping import can_shape, needs_shaping
from lens_jax.data.lettering import WORDS
from lens_jax.errors import LensError

# Characters of one string: some six lines.
MAX_LETTERS = 200
MAX_FILE = 256 << 20
# Directions, byte-order marks and breaks that nobody sees. Without them a text reads as its letters do; kept, an
# override could show another one than the caption quotes.
_UNSEEN = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]")
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？।॥؟])\s*")
# What no phrase ends with.
_UNFINISHED = {
    "a", "an", "the", "of", "in", "on", "at", "with", "and", "or", "to", "from", "by", "for", "its", "his", "her",
    "their", "beside", "behind", "front",
}  # fmt: skip


@dataclass(frozen=True)
class String:
    """A text to write."""

    text: str
    # What it is called in a caption: "word", "words", "number", "price", "date".
    kind: str


@dataclass(frozen=True)
class Strings:
    """What texts are drawn from."""

    # Lines of files.
    lines: tuple[str, ...] = ()
    # Of other images.
    captions: tuple[str, ...] = ()
    # Keys of LOCALES, for numbers, prices and dates.
    locales: tuple[str, ...] = ("en",)

    def __post_init__(self):
        for locale in self.locales:
            if locale not in LOCALES:
                raise LensError(f"synthetic.locales: {locale!r:.40} is unknown; accepted: {', '.join(LOCALES)}")

    def draw(self, rng: np.random.Generator) -> String:
        """One of them: of lines half the time where there are any; words are English ones."""
        sources = [(self._number, 1.0), (self._price, 1.0), (self._date, 1.0), (_words, 3.0)]
        if self.captions:
            sources.append((self._phrase, 3.0))
        if self.lines:
            sources.append((self._line, sum(weight for _, weight in sources)))
        weights = np.array([weight for _, weight in sources])
        source, _ = sources[rng.choice(len(sources), p=weights / weights.sum())]
        return source(rng)

    def _line(self, rng: np.random.Generator) -> String:
        return _string(self.lines[rng.integers(len(self.lines))])

    def _phrase(self, rng: np.random.Generator) -> String:
        clauses = re.split(r"[,.;:]\s+", self.captions[rng.integers(len(self.captions))].strip(" ."))
        words = clauses[rng.integers(len(clauses))].split()[: int(rng.integers(2, 9))]
        while words and words[-1].lower() in _UNFINISHED:
            words.pop()
        return _string(_in_case(" ".join(words), rng)) if words else _words(rng)

    def _number(self, rng: np.random.Generator) -> String:
        return String(self._locale(rng).number(_some_number(rng)), "number")

    def _price(self, rng: np.random.Generator) -> String:
        return String(self._locale(rng).price(_some_price(rng)), "price")

    def _date(self, rng: np.random.Generator) -> String:
        locale = self._locale(rng)
        if rng.random() < 0.3:
            return String(locale.weekdays[rng.integers(7)], "word")
        day, month, year = (int(number) for number in rng.integers((1, 0, 1950), (29, 12, 2040)))
        return String(locale.date(day, month, year), "date")

    def _locale(self, rng: np.random.Generator):
        return LOCALES[self.locales[rng.integers(len(self.locales))]]


def read_lines(paths: Sequence[str]) -> tuple[tuple[str, ...], tuple[Refused, ...]]:
    """The strings in text files, one a line, and what of them cannot be used, files and lines.

    Long lines are cut where their sentences end.
    """
    lines, refused = [], []
    for path in paths:
        try:
            file = Path(path).expanduser()
            if file.stat().st_size > MAX_FILE:
                refused.append(Refused(path, "unreadable text", f"over {MAX_FILE} bytes"))
                continue
            text = file.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            refused.append(Refused(path, "unreadable text", getattr(error, "strerror", None) or "not UTF-8"))
            continue
        found, problems = clean(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), path)
        if not found:
            refused.append(Refused(path, "empty text", "no line that can be written"))
        lines.extend(found)
        refused.extend(problems)
    return tuple(lines), tuple(refused)


def clean(lines: Iterable[str], where: str) -> tuple[list[str], list[Refused]]:
    """Lines as they can be written and quoted, and those that cannot, with their numbers."""
    found, refused = [], []
    for number, line in enumerate(lines, 1):
        line = " ".join(_UNSEEN.sub("", unicodedata.normalize("NFC", line)).split())
        if not line:
            continue
        if reason := _fault(line):
            refused.append(Refused(f"{where}:{number}", *reason))
            continue
        pieces = [line] if len(line) <= MAX_LETTERS else [piece for piece in _SENTENCE_END.split(line) if piece]
        fitting = [piece for piece in pieces if len(piece) <= MAX_LETTERS]
        if len(fitting) < len(pieces):
            longest = max(map(len, pieces))
            detail = f"a sentence of {longest} letters; {MAX_LETTERS} fit"
            refused.append(Refused(f"{where}:{number}", "too long", detail))
        found.extend(fitting)
    return found, refused


def _fault(line: str) -> tuple[str, str] | None:
    for letter in line:
        # Control, surrogate, private use, unassigned: nothing that has a look of its own.
        if unicodedata.category(letter) in ("Cc", "Cs", "Co", "Cn") or letter == "\ufffd":
            return "odd character", f"U+{ord(letter):04X}"
    if all(unicodedata.category(letter)[0] in "MCZ" for letter in line):
        return "odd character", "only marks"
    if not can_shape() and needs_shaping(line):
        return "needs shaping", "Pillow has no raqm here, and would draw the letters of this script wrong"
    return None


def _string(text: str) -> String:
    # Of scripts without spaces a caption cannot tell words from a word.
    spaced = " " in text or any(unicodedata.name(letter, "").startswith(("CJK", "HIRAGANA", "THAI")) for letter in text)
    return String(text, "words" if spaced else "word")


def _words(rng: np.random.Generator) -> String:
    chosen = rng.choice(len(WORDS), size=int(rng.choice([1, 2, 3, 4], p=[0.4, 0.3, 0.2, 0.1])))
    return _string(_in_case(" ".join(WORDS[i] for i in chosen).lower(), rng))


def _in_case(text: str, rng: np.random.Generator) -> str:
    # Not str.title, which makes "dog's" into "Dog'S".
    return (str.upper, string.capwords, str.capitalize, str)[rng.integers(4)](text)


def _some_number(rng: np.random.Generator) -> int:
    """Of one to seven digits, all lengths alike."""
    return int(10 ** rng.uniform(0, 7))


def _some_price(rng: np.random.Generator) -> float:
    whole = int(10 ** rng.uniform(0, 4))
    return whole + float(rng.choice([0.0, 0.5, 0.95, 0.99, rng.integers(100) / 100]))
