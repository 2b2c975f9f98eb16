"""Labels of a sheet."""

import numpy as np
from PIL import ImageFont

from lens_jax import contact_sheet


class Counting:
    """A font that counts the letters it measured."""

    def __init__(self):
        self.font, self.letters = ImageFont.load_default(12), 0

    def getlength(self, text):
        self.letters += len(text)
        return self.font.getlength(text)


def test_a_label_is_cut_at_once():
    """As wide as fits; and what is measured does not grow with the prompt."""
    letters = {}
    for words in (200, 20_000):
        font = Counting()
        label = contact_sheet._fitting("word " * words, font, 300)
        assert label.endswith("…")
        assert 270 < font.font.getlength(label) <= 300
        letters[words] = font.letters
    assert max(letters.values()) < 5_000
    assert contact_sheet._fitting("red apple", font, 300) == "red apple"
    assert contact_sheet._fitting("two\nlines", font, 300) == "two lines"


def test_a_sheet_of_long_prompts():
    sheet = contact_sheet.contact_sheet([[np.zeros((16, 16, 3), np.uint8)]] * 2, ["x" * 10_000, ""])
    assert max(sheet.size) < 400


def test_a_label_that_no_font_has_is_a_number():
    """Boxes say nothing; the file beside the sheet has the prompt."""
    assert contact_sheet._readable("a fox", 0)[0] == "a fox"
    assert contact_sheet._readable("лиса, é", 1)[0] == "лиса, é"
    assert contact_sheet._readable("狐狸", 2)[0] == "row 3"
