"""Caption lengths: records whose captions are about as long lie together, so that batches of them pad little.

A length is in tokens that reach the denoiser: those of the caption itself and those that stand behind every prompt.
"""

from collections.abc import Callable, Iterable, Sequence

from lens_jax.errors import LensError

# Tokens behind every prompt of the release (encoders/harmony.py, SUFFIX_TOKENS).
BEHIND = 22


def check_classes(classes: Sequence[int]) -> tuple[int, ...]:
    """The classes themselves; LensError unless they ascend from at least 1."""
    if any(n < 1 for n in classes) or sorted(set(classes)) != list(classes):
        raise LensError(f"caption_classes {' '.join(map(str, classes))}: numbers of tokens that ascend, such as 64 128")
    return tuple(classes)


def text_class(length: int, classes: Sequence[int]) -> int:
    """The smallest class that holds `length` tokens; 0, which is any length, where none does."""
    return next((most for most in classes if length <= most), 0)


def longest(captions: Iterable[Sequence[str]], count: Callable[[str], int]) -> int:
    """The length of the longest of a record's captions, given what `count` says of each without what is behind it."""
    return BEHIND + max(count(text) for texts in captions for text in texts)


def estimate(text: str) -> int:
    """About how many tokens GPT-OSS's tokenizer makes of a text: too many in nearly all, since too few cost words.

    A token for three bytes of mostly ASCII text, for two of any other. Against the real vocabulary, texts of 40 to 160
    words (messages of Linux packages, 18 languages) and captions of scenes (12): below the true length in 3.5 %
    of English texts and 0 % of English captions, in at most 11 % of any language's (Turkish); 1.54 and 1.64 times too
    long in English, 1.1 to 3.6 times elsewhere.
    """
    size = len(text.encode())
    return -(-size // (3 if size <= 1.1 * len(text) else 2))
