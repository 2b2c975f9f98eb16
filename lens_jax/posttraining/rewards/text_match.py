"""How well the text read in an image agrees with the text that a prompt wants there."""

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np


def fold(text: str, case: bool) -> str:
    """In one form of Unicode (NFKC: full-width and ligatures as their letters), with single blanks, and without case
    unless it counts."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return text if case else text.casefold()


def words(text: str) -> list[str]:
    """The words of a folded text, without the punctuation around them."""
    bare = (_trimmed(word) for word in text.split())
    return [word for word in bare if word]


def _trimmed(word: str) -> str:
    inside = [i for i, c in enumerate(word) if unicodedata.category(c)[0] in "LNMS"]
    return word[inside[0] : inside[-1] + 1] if inside else ""


def substring_distance(wanted: str, found: str) -> int:
    """The least edit distance (insert, delete, replace: 1 each) of `wanted` to any piece of `found`; the whole of
    `wanted` where nothing of it is there.

    Sellers' algorithm: the table of the edit distance, in which a piece may begin anywhere (row 0 is zero) and end
    anywhere (the least of the last row). A row at a time; what comes from the left is a running minimum.
    """
    target = np.frombuffer(found.encode("utf-32-le"), np.uint32)
    steps = np.arange(len(target) + 1)
    row = np.zeros(len(target) + 1, np.int64)
    for i, char in enumerate(wanted):
        replaced = row[:-1] + (target != ord(char))
        best = np.concatenate([[i + 1], np.minimum(replaced, row[1:] + 1)])
        row = np.minimum.accumulate(best - steps) + steps
    return int(row.min())


def similarity(wanted: str, found: str) -> float:
    """1 - distance / length of `wanted`, blanks left out of both: 1 where it is there letter for letter, 0 where none
    of it is. A reader joins and splits words as lines are set, so blanks say little."""
    wanted, found = wanted.replace(" ", ""), found.replace(" ", "")
    return 1 - substring_distance(wanted, found) / len(wanted) if wanted else 1.0


def word_accuracy(wanted: Sequence[str], found: Sequence[str]) -> float:
    """The share of the words of `wanted` that are among those of `found`, each as often as it is wanted."""
    want, have = Counter(wanted), Counter(found)
    return sum((want & have).values()) / max(1, sum(want.values()))
