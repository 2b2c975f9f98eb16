"""Prompts that say the same as an earlier one."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

# Words in a row that are compared.
_ROW = 3
# Of the rows of two prompts together, the share that both have, from which the later one is a duplicate. Two prompts of
# 40 words that differ in three words far apart share 29 of 47 rows, 0.62.
_SAME = 0.6


def normalised(prompt: str) -> tuple[str, ...]:
    """Its words without case and punctuation."""
    letters = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in prompt.casefold())
    return tuple(letters.split())


def find_duplicates(prompts: Iterable[tuple[str, str]]) -> dict[str, str]:
    """{id: the id of the earlier prompt that it repeats} of (id, prompt) in order; what is kept is in none of the keys.

    A prompt is compared with those that are kept, so which are dropped follows from their order alone.
    """
    rows_of: dict[str, frozenset] = {}
    holders: dict[tuple[str, ...], list[str]] = defaultdict(list)
    found = {}
    for id, prompt in prompts:
        words = normalised(prompt)
        rows = frozenset(words[i : i + _ROW] for i in range(max(1, len(words) - _ROW + 1)))
        shared = Counter(other for row in rows for other in holders[row])
        for other, count in shared.most_common(1):
            if count / (len(rows) + len(rows_of[other]) - count) >= _SAME:
                found[id] = other
        if id not in found:
            rows_of[id] = rows
            for row in rows:
                holders[row].append(id)
    return found
