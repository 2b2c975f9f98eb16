"""What counts as a caption: each rule by texts that break it and by texts that come close and do not."""

import random
from collections import Counter

import pytest

from lens_jax.data.engine.captions import checks
from lens_jax.llm.request import Answer

FOX = (
    "A red fox with a bushy tail sits in fresh snow beside a weathered wooden fence and looks to the left, while "
    "three brown sparrows perch on the top rail against a pale winter sky."
)


def reason(text: str, kinds=("dense",), **answer) -> str:
    with pytest.raises(checks.Rejected) as rejected:
        checks.read(Answer(text, **answer), kinds, Counter())
    return rejected.value.reason


def said(text: str, kinds=("dense",)) -> tuple[dict[str, str], Counter]:
    repaired = Counter()
    return checks.read(Answer(text, "stop"), kinds, repaired), repaired


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("<think>A fox, so I describe it.</think>\n", "empty"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("I’m unable to identify the people in this photo, but I can say that they are standing.", "refusal"),
        ("Unfortunately, I cannot describe this image because it shows a person who could be identified.", "refusal"),
        ("A red fox in snow.", "too short"),
        (" ".join(f"{FOX[:-1]} number {i}." for i in range(30)), "too long"),
        (FOX + " \ud800", "characters"),
        (FOX + " \x07", "characters"),
        (FOX + " It is **very** cold.", "markup"),
        (FOX + ' <b>Cold</b> and <a href="x">white</a>.', "markup"),
        ("# A fox\n" + FOX, "markup"),
        ("- " + FOX + "\n- The sky is pale.\n- It is cold.", "list"),
        ("1. " + FOX + "\n2. The sky is pale.", "list"),
        ("The image is a photograph in muted colours, and " + FOX[0].lower() + FOX[1:], "lead-in"),
        (FOX + " The sky is grey and the sky is grey and" * 4, "loop"),
        ("snow on the fence and " * 40, "loop"),
        (FOX + " There is no visible text in it.", "speaks of absent text"),
        (FOX + " It doesn't contain any legible writing.", "speaks of absent text"),
        (FOX + " The sign is blank, without any readable words or letters.", "speaks of absent text"),
        (FOX + " Text is not present.", "speaks of absent text"),
        ("Ein roter Fuchs sitzt im frischen Schnee neben einem verwitterten Zaun und schaut nach links, während drei "
         "Spatzen auf dem Balken sitzen.", "language"),
        ("Un zorro rojo está sentado en la nieve junto a una vieja valla de madera y mira hacia la izquierda mientras "
         "tres gorriones descansan.", "language"),
        ("一只红色的狐狸坐在雪地里 " * 3 + "旁边 有 一 道 破旧 的 木 栅栏 三 只 麻雀 停 在 上面", "language"),
    ],
)  # fmt: skip
def test_refused(text, why):
    assert reason(text) == why


def test_what_the_server_says():
    assert reason(FOX, finish_reason="length") == "cut off"
    assert reason(FOX, finish_reason="content_filter") == "refusal"
    assert reason("", refusal="I can't assist with that.") == "refusal"


@pytest.mark.parametrize(
    "text",
    [
        FOX,
        # Foreign and strange writing is quoted as it stands.
        FOX + ' A sign reads "Zutritt verboten! Eltern haften für ihre Kinder", another „Vorsicht“ and 「立入禁止」.',
        FOX + ' A poster says "NO TEXT HERE", a shirt "**SALE** <b>50%</b>", and a note “# 1. buy milk”.',
        # Foreign names are English captions all the same.
        "A plate of tagliatelle alla bolognese with parmigiano reggiano stands beside a glass of montepulciano on a "
        "checked tablecloth at the trattoria Da Enzo.",
        # These speak of things, not of writing that is not there.
        FOX + " It has no collar, and the fence is without paint; the text of a letter lies in the snow.",
        "In the scene's centre, " + FOX[0].lower() + FOX[1:],
        "Sorrel grows " + "beside a fence of old boards where a fox sits and three sparrows look to the left, quietly.",
    ],
)
def test_accepted_as_it_is(text):
    found, repaired = said(text)
    assert found == {"dense": text}
    assert not repaired


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("Here is a detailed caption of the image:\n\n" + FOX, "lead-in cut off"),
        ("Sure! Here's the caption: " + FOX, "lead-in cut off"),
        ("**Dense caption:** " + FOX, "lead-in cut off"),
        ("The image shows a" + FOX[1:], "lead-in cut off"),
        ("In this photograph, we see a" + FOX[1:], "lead-in cut off"),
        (f'"{FOX}"', "lead-in cut off"),
        (f"```text\n{FOX}\n```", "fence"),
        (FOX.replace(", while", ",\n\nwhile"), "paragraphs joined"),
        ("<think>\nhm\n</think>\n\n" + FOX, None),
    ],
)
def test_put_right(text, counted):
    found, repaired = said(text)
    assert found == {"dense": FOX}
    assert repaired == (Counter({counted: 1}) if counted else Counter())


def test_brief_and_both():
    assert said("a photo of a cat", ("brief",))[0] == {"brief": "a photo of a cat"}
    assert reason("ein Foto einer Katze", ("brief",)) == "language"
    assert reason(FOX + FOX, ("brief",)) == "too long"
    both = ("dense", "brief")
    text = f'```json\n{{"dense": "The image shows a{FOX[1:]}", "brief": "a fox in snow"}}\n```'
    assert said(text, both)[0] == {"dense": FOX, "brief": "a fox in snow"}
    for wrong in (FOX, "[1]", '{"dense": "x"}', '{"dense": 1, "brief": "a fox"}', "[" * 100_000):
        assert reason(wrong, both) == "not JSON"


def test_no_text_takes_long():
    """Whatever a server sends, at once: none of the patterns backtracks over a long text."""
    for text in ("a" * 5_000_000, "- " * 500_000, '"' * 200_001, "no " * 300_000, "<" * 300_000, "The image " * 90_000):
        assert reason(text)


def test_limits_are_inclusive():
    """15 to 499 words."""
    rng = random.Random(0)
    words = [f"{word}{rng.randrange(10_000)}" if i % 2 else word for i, word in enumerate(FOX.split() * 20)]
    for count in (15, 499):
        assert len(said(" ".join(words[:count]))[0]["dense"].split()) == count
    assert reason(" ".join(words[:14])) == "too short"
    assert reason(" ".join(words[:500])) == "too long"
