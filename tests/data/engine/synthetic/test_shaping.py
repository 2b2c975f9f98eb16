"""Scripts whose letters change with their neighbours come out right, and no box is drawn for a missing glyph."""

import pytest
from PIL import ImageFont

from lens_jax.data.engine.synthetic import materials, strings
from lens_jax.data.engine.synthetic.fonts import load_fonts
from lens_jax.data.engine.synthetic.shaping import covers, is_right_to_left, needs_shaping, shape
from lens_jax.errors import LensError

ARABIC, HINDI = "السلام عليكم", "हिन्दी"


@pytest.fixture(scope="module")
def fonts(amiri, devanagari, latin):
    found, refused = load_fonts([amiri, devanagari, latin[0]])
    assert not refused
    by_family = {font.family.split()[0]: font for font in found}
    return by_family["Amiri"], by_family["Noto"], by_family["Roboto"]


def test_arabic_is_drawn_from_the_right_in_joined_forms(dejavu):
    """Golden: from left to right the last letter first, each in the form that Unicode has for where it stands in its
    word (meem final, kaf medial, ... ain initial; alone the letter itself), lam and alef as one."""
    (font,), _ = load_fonts([dejavu])
    forms = "\ufee2\ufedc\ufef4\ufee0\ufecb \u0645\ufefc\ufeb4\ufedf\u0627"
    expected = [shape(font, form)[0].number for form in forms]
    assert 0 not in expected
    assert [glyph.number for glyph in shape(font, ARABIC)] == expected
    assert [glyph.cluster for glyph in shape(font, ARABIC)] == [11, 10, 9, 8, 7, 6, 5, 3, 2, 1, 0]


def test_a_vowel_of_devanagari_moves_before_its_consonant(fonts):
    """The short i is written behind the letter it is heard after, and drawn before it; n and d become one."""
    clusters = [glyph.cluster for glyph in shape(fonts[1], HINDI)]
    assert len(clusters) < len(HINDI)
    vowel, consonant = shape(fonts[1], "हि")
    assert consonant.number == shape(fonts[1], "ह")[0].number
    assert vowel.number != consonant.number


@pytest.mark.parametrize(("which", "text"), [(0, ARABIC), (1, HINDI)])
def test_what_is_drawn_is_what_is_shaped(fonts, which, text):
    """Pillow's length with raqm is that of HarfBuzz's glyphs, and without it another one."""
    font = fonts[which]
    size = 512
    lengths = {
        engine: ImageFont.truetype(font.path, size, layout_engine=engine).getlength(text)
        for engine in (ImageFont.Layout.RAQM, ImageFont.Layout.BASIC)
    }
    units = 1000  # both fonts have so many an em
    shaped = sum(glyph.advance for glyph in shape(font, text)) * size / units
    # FreeType rounds each advance to a 64th of a pixel, or with hinting to a whole one.
    assert abs(lengths[ImageFont.Layout.RAQM] - shaped) <= len(text)
    assert abs(lengths[ImageFont.Layout.BASIC] - shaped) > 2 * len(text)


def test_a_font_without_a_letter_is_not_taken(fonts):
    arabic, hindi, latin = fonts
    assert covers(arabic, ARABIC)
    assert covers(hindi, HINDI)
    assert not covers(latin, ARABIC)
    assert not covers(latin, HINDI)
    assert not covers(arabic, "漢字")
    assert not covers(latin, "pizza 🍕")
    assert not covers(latin, f"both {ARABIC}")
    assert covers(hindi, "क\u200dष")  # a joiner has no glyph and needs none


@pytest.mark.parametrize(
    ("text", "shaped", "from_right"),
    [
        (ARABIC, True, True),
        (HINDI, True, False),
        ("שלום", True, True),
        ("ยินดี", True, False),
        ("Größe 12 €", False, False),
        ("Việt", False, False),
        ("漢字", False, False),
        ("12 شارع", True, True),
    ],
)
def test_which_scripts_need_it(text, shaped, from_right):
    assert needs_shaping(text) == shaped
    assert is_right_to_left(text) == from_right


def test_without_raqm_such_scripts_are_refused(fonts, monkeypatch):
    monkeypatch.setattr(strings, "can_shape", lambda: False)
    monkeypatch.setattr(materials, "can_shape", lambda: False)
    kept, refused = strings.clean(["plain", ARABIC, HINDI], "here")
    assert kept == ["plain"]
    assert [problem.reason for problem in refused] == ["needs shaping"] * 2
    with pytest.raises(LensError, match=r"locales: ar .*raqm"):
        materials._check_locales(("en", "ar"), fonts)
