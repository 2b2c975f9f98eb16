"""Which lines are written, whatever is in a file of strings."""

import numpy as np
import pytest

from lens_jax.data.engine.synthetic.locales import LOCALES
from lens_jax.data.engine.synthetic.strings import MAX_LETTERS, Strings, clean, read_lines
from lens_jax.errors import LensError


@pytest.mark.parametrize(
    ("line", "kept", "reasons"),
    [
        ("  two\twords  ", ["two words"], []),
        ("e\u0301te\u0301", ["été"], []),
        # An override would show it from the right, which a caption cannot quote.
        ("\u202eabc\u202c\u200f", ["abc"], []),
        ("\ufeff\u200b", [], []),
        ("bell \x07", [], ["odd character"]),
        ("half \ud83d", [], ["odd character"]),
        ("was \ufffd", [], ["odd character"]),
        ("\u0301", [], ["odd character"]),
        ("👩\u200d🚀 liftoff", ["👩\u200d🚀 liftoff"], []),
        ("a" * 100_000, [], ["too long"]),
        ("One. " * 20_000, ["One."] * 20_000, []),
        ("Short. " + "b" * (MAX_LETTERS + 1), ["Short."], ["too long"]),
        ("\u0644\u0627 \u200cok", ["\u0644\u0627 \u200cok"], []),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_a_line_is_written_as_it_is_seen_or_refused(line, kept, reasons):
    found, refused = clean([line], "lines.txt")
    assert found == kept
    assert [problem.reason for problem in refused] == reasons
    assert all(problem.name == "lines.txt:1" and "\n" not in str(problem) for problem in refused)


def test_files_that_give_nothing_are_named(tmp_path):
    good, empty, binary = (tmp_path / name for name in ("good [1].txt", "empty.txt", "binary.txt"))
    good.write_bytes("\ufeffgood\r\nlines\rhere".encode())
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe\x00")
    lines, refused = read_lines([str(good), str(empty), str(binary), str(tmp_path / "none.txt")])
    assert lines == ("good", "lines", "here")
    assert [problem.reason for problem in refused] == ["empty text", "unreadable text", "unreadable text"]


@pytest.mark.parametrize(
    ("locale", "number", "price", "date"),
    [
        ("en", "1,234,567", "$1,234.50", "September 3, 2026"),
        ("de", "1.234.567", "1.234,50 €", "3. September 2026"),
        ("hi", "12,34,567", "₹1,234.50", "3 सितंबर 2026"),
        ("ar", "١٬٢٣٤٬٥٦٧", "١٬٢٣٤٫٥٠ ج.م.", "٣ سبتمبر ٢٠٢٦"),
        ("ja", "1,234,567", "¥1,234", "2026年9月3日"),
        ("th", "1,234,567", "฿1,234.50", "3 กันยายน 2569"),
    ],
)
def test_numbers_are_written_as_a_language_does(locale, number, price, date):
    found = LOCALES[locale]
    assert (found.number(1234567), found.price(1234.5), found.date(3, 8, 2026)) == (number, price, date)


def test_all_languages_are_whole():
    for locale in LOCALES.values():
        assert len(set(locale.weekdays)) == 7
        assert len(set(locale.months)) in (0, 12)
        assert locale.number(7) == locale.digits[7]


def test_an_unknown_language_is_named():
    with pytest.raises(LensError, match=r"'xx' is unknown; accepted: en, de"):
        Strings(locales=("xx",))


def test_half_of_what_is_drawn_is_of_the_files():
    rng = np.random.default_rng(0)
    found = [Strings(("mine",), ("a red fox in the snow",), ("en", "de")).draw(rng) for _ in range(400)]
    assert 160 < sum(string.text == "mine" for string in found) < 240
    assert {string.kind for string in found} == {"word", "words", "number", "price", "date"}
    assert not any(string.text.lower().endswith((" in", " the")) for string in found)
