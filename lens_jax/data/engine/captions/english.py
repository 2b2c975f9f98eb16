"""Whether a text is English, by py3langid: its model is in the package."""

import functools
import re

from lens_jax.errors import LensError

# Nats a letter by which another language must be likelier before a text is taken to be of it, and the letters it holds
# for; then those of further letters. Foreign names make it 1.0 in short English texts ("a plate of spaghetti alla
# carbonara"); texts in German, French, Spanish or Portuguese have 1.5 to 2.6.
_SHORT, _FIRST, _LONG = 1.2, 40, 0.4
# Fewer letters than this say nothing.
_LEAST_LETTERS = 12
_LETTERS = re.compile(r"[^\W\d_]")
_LATIN = re.compile(r"[A-Za-zÀ-ɏ]")


def is_english(text: str) -> bool:
    """Whether a text without its quotations is English, or too short to tell and in Latin letters."""
    letters = _LETTERS.findall(text)
    if sum(map(bool, map(_LATIN.match, letters))) < 0.7 * len(letters):
        return False
    if len(letters) < _LEAST_LETTERS:
        return True
    ranked = _ranking()(text)
    english = dict(ranked).get("en", float("-inf"))
    margin = _SHORT * min(len(letters), _FIRST) + _LONG * max(0, len(letters) - _FIRST)
    return ranked[0][1] - english <= margin


def load() -> None:
    """Load the model, which takes a second: before anything is asked and paid for. LensError where it is missing."""
    _ranking()("A text by which the model is loaded.")


@functools.cache
def _ranking():
    """(language, log-probability) from the likeliest on."""
    try:
        import py3langid
    except ImportError:
        raise LensError("the language of captions is checked by py3langid: pip install 'lens-jax[data]'") from None
    return py3langid.rank
