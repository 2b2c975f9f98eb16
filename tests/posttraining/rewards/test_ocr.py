"""Texts: distances against a plain table, and the reader on rendered words."""

import itertools

import numpy as np
import pytest

from lens_jax.posttraining.prompts.prompt import Prompt
from lens_jax.posttraining.rewards.ocr import Ocr, compare
from lens_jax.posttraining.rewards.text_match import fold, similarity, substring_distance, word_accuracy, words


def edit_distance(a: str, b: str) -> int:
    """The table of the textbook."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        row, old = [i + 1], row
        for j, y in enumerate(b):
            row.append(min(old[j] + (x != y), old[j + 1] + 1, row[j] + 1))
    return row[-1]


def test_substring_distance_is_the_least_of_all_pieces():
    rng = np.random.default_rng(0)
    for _ in range(60):
        wanted, found = ("".join(rng.choice(list("abcé"), rng.integers(0, n))) for n in (6, 9))
        pieces = [found[i:j] for i, j in itertools.combinations_with_replacement(range(len(found) + 1), 2)]
        assert substring_distance(wanted, found) == min(edit_distance(wanted, piece) for piece in pieces)


def test_similarity_and_words():
    assert similarity("open air", "welcome to the openair 2026") == 1.0
    assert similarity("abcd", "xxabzdxx") == 0.75
    assert similarity("abcd", "") == 0.0
    assert fold("  ＯＰＥＮ\tAir ﬁne ", case=False) == "open air fine"
    assert words("“don't” -- stop! 3.5 €") == ["don't", "stop", "3.5", "€"]
    assert word_accuracy(["a", "a", "b"], ["a", "b", "c"]) == 2 / 3
    values = compare(("Open Air", "7 June"), ["OPEN AIR", "7 Jane", "sponsored by"], case=False)
    assert values == {"letters": (1 + 0.8) / 2, "words": 3 / 4, "extra": 1 - 3 / 6}
    assert compare(("Open",), ["OPEN"], case=True)["words"] == 0.0
    assert compare(("Open",), [], case=True) == {"letters": 0.0, "words": 0.0, "extra": 0.0}


def test_reads_what_is_written():
    """Rendered words get 1, others less, an empty image 0, and a prompt without texts nothing."""
    pytest.importorskip("rapidocr", reason="pip install 'lens-jax[ocr]'")
    from PIL import Image, ImageDraw, ImageFont

    def rendered(*lines: str) -> np.ndarray:
        image = Image.new("RGB", (400, 200), "white")
        for i, line in enumerate(lines):
            ImageDraw.Draw(image).text((20, 20 + 90 * i), line, "navy", ImageFont.load_default(48))
        return np.asarray(image)

    prompt = Prompt("a", "a sign", texts=("OPEN AIR", "2026"))
    reward = Ocr(readers=1).load()
    reward.check()
    right, wrong, empty, other = reward.score(
        [rendered("OPEN AIR", "2026"), rendered("OPEN BAR", "1999"), rendered(), rendered("OPEN")],
        [prompt] * 3 + [Prompt("b", "a cat")],
    )
    reward.close()
    assert dict(right.values) == {"ocr": 1.0, "ocr/letters": 1.0, "ocr/words": 1.0, "ocr/extra": 0.0}
    assert 0.2 < wrong.values["ocr"] < 0.8
    assert wrong.values["ocr/words"] == 1 / 3
    assert empty.values["ocr"] == 0.0
    assert (dict(other.values), other.error) == ({}, None)
