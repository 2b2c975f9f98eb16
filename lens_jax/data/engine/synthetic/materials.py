"""What images of text are drawn with, loaded and checked once: fonts, strings, backgrounds, shapes."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lens_jax.data.buckets import SAME_AREA, Bucket, parse_buckets
from lens_jax.data.engine.config import EngineConfig, Synthetic
from lens_jax.data.engine.synthetic import strings as strings_
from lens_jax.data.engine.synthetic.backgrounds import Backgrounds, open_backgrounds
from lens_jax.data.engine.synthetic.fonts import Font, Refused, load_fonts
from lens_jax.data.engine.synthetic.locales import LOCALES
from lens_jax.data.engine.synthetic.shaping import can_shape, covers, needs_shaping
from lens_jax.data.engine.synthetic.strings import Strings, read_lines
from lens_jax.errors import LensError, LensWarning

# Captions of backgrounds that phrases are taken of.
_PHRASES_OF = 2000


@dataclass(frozen=True)
class Materials:
    """All that an image of text follows from, besides a seed and a number."""

    fonts: tuple[Font, ...]
    strings: Strings
    backgrounds: Backgrounds
    # Sizes of images, each drawn alike.
    shapes: tuple[Bucket, ...]
    style: str = "augmented"
    encoding: str = "jpeg"
    # What was given and cannot be used.
    refused: tuple[Refused, ...] = ()

    def counts(self) -> Mapping[str, int]:
        """What cannot be used, by reason."""
        return Counter(refused.reason for refused in self.refused)


def load_materials(config: EngineConfig) -> Materials:
    """Reads what `config.synthetic` names. LensError where nothing could be drawn with it, or with one of its
    languages; single fonts, files and lines that cannot be used are in `refused`, and a warning counts them."""
    given = config.synthetic
    fonts, refused = load_fonts(given.fonts)
    problems = list(refused)
    if not fonts:
        raise LensError(f"synthetic.fonts: none of {len(refused)} files can be used; {_first(refused)}")
    _check_locales(given.locales, fonts)
    backgrounds = open_backgrounds(given.backgrounds)
    lines, refused = read_lines(given.texts)
    kept, uncovered = _covered(lines, fonts)
    problems += [*refused, *uncovered]
    if given.texts and not kept:
        raise LensError(f"synthetic.texts: no line of {', '.join(given.texts):.200} can be written; {_first(problems)}")
    captions, _ = strings_.clean(backgrounds.captions(_PHRASES_OF), "caption")
    captions, _ = _covered(captions, fonts)
    made = Materials(
        fonts,
        Strings(tuple(kept), tuple(captions), tuple(given.locales)),
        backgrounds,
        shapes(given.size, parse_buckets(config.buckets)),
        given.style,
        config.encoding,
        tuple(problems),
    )
    if problems:
        counted = ", ".join(f"{count} {reason}" for reason, count in sorted(made.counts().items()))
        warnings.warn(f"images of text: left out {counted}; first: {problems[0]}", LensWarning, stacklevel=2)
    return made


def shapes(size: int, buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """The buckets whose area is that of `size`, so that nothing is resampled later; a square where there are none."""
    area = size * size
    found = [b for b in buckets if 1 / SAME_AREA < b.height * b.width / area < SAME_AREA]
    return tuple(found) or (Bucket(size, size),)


def fingerprint(given: Synthetic) -> Mapping[str, object]:
    """What the images depend on besides numbers: the contents of fonts and texts, and which backgrounds there are."""
    fonts, _ = load_fonts(given.fonts)
    digests = sorted({font.digest for font in fonts})
    texts = [_digest(path) for path in given.texts]
    behind = [source.fingerprint() for source in open_backgrounds(given.backgrounds).sources]
    return {"fonts": digests, "texts": texts, "backgrounds": behind, "shaping": can_shape()}


def _check_locales(locales: Sequence[str], fonts: Sequence[Font]) -> None:
    Strings(locales=tuple(locales))  # whether they are known
    for name in locales:
        locale = LOCALES[name]
        samples = (locale.weekdays[0], locale.date(28, 8, 2036), locale.price(12345.99))
        if needs_shaping(samples[0]) and not can_shape():
            raise LensError(
                f"synthetic.locales: {name} has a script that must be shaped, and this Pillow is built without raqm; "
                "take Pillow's wheel for your system, or leave the language out"
            )
        # Of one kind at least: many fonts of other scripts have no Latin digits.
        if not any(covers(font, sample) for sample in samples for font in fonts):
            raise LensError(f"synthetic.locales: no font of synthetic.fonts has all letters of {samples[0]!r} ({name})")


def _covered(lines: Sequence[str], fonts: Sequence[Font]) -> tuple[list[str], list[Refused]]:
    """The lines that some font has all letters of."""
    # Fonts of many letters first: one of them has nearly every line.
    ordered = sorted({font.letters: font for font in fonts}.values(), key=lambda font: -len(font.letters))
    kept, refused = [], []
    for line in lines:
        if any(covers(font, line) for font in ordered):
            kept.append(line)
        else:
            missing = {letter for letter in line if not any(ord(letter) in font.letters for font in ordered)}
            named = ", ".join(f"U+{ord(letter):04X}" for letter in sorted(missing)[:5])
            refused.append(Refused(f"{line:.40}", "no font has all letters", f"none has {named}" if named else ""))
    return kept, refused


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    except OSError:
        return ""


def _first(problems: Sequence[Refused]) -> str:
    return str(problems[0]) if problems else "none was found"
