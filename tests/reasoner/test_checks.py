import itertools
import random

import pytest

from lens_jax.reasoner import checks
from lens_jax.reasoner.rewrite import REASONS


def reason(prompt: str, answer: str, tokens: int = 10, refusal: str = "") -> str:
    problem = checks.find(prompt, answer, tokens=tokens, most_tokens=393, refusal=refusal)
    if problem is None:
        return ""
    assert problem.reason in REASONS
    assert problem.detail.isprintable()
    assert 0 < len(problem.detail) <= 120
    return problem.reason


# What the release's regular expressions break: it is drawn as it is.
@pytest.mark.parametrize(
    "answer",
    [
        '"OPEN" is written on a sign that says "CLOSED"',
        'A newspaper with the headline "assistant final" on a desk',
        "Analysis of a leaf under glass, in ink and water colour",
        "final: the last scene of a play",
        "A poem on a wall:\n\nthe first line\n\tthe second line",
        "<|channel|> is painted on a door",
        "“Whole prompts may be quoted, too.”",
    ],
)
def test_nothing_but_blanks_is_cut_off(answer):
    assert checks.normalised(f" \n{answer}\r\n ") == answer
    assert reason(answer, answer) == ""


def test_normalised_ends_lines_alike_and_has_no_control_characters():
    assert checks.normalised("\x00a\x1b[1m red\x9b\r\nfox\u2028runs\r\t👩‍🚀 \x85") == "a[1m red\nfox\nruns\n\t👩‍🚀"


def test_same_but_for_blanks():
    assert checks.same(" a  red\nfox ", "a red fox")
    assert not checks.same("a red fox", "a redfox")
    assert not checks.same("a red fox", "A red fox")


@pytest.mark.parametrize("answer", ["", " \n\t ", "\u200b\u2060", "\x00"])
def test_empty(answer):
    assert reason("a fox", answer) == "empty"


def test_first_of_many_problems():
    prompt = 'a sign "OPEN" and 3 foxes'
    assert reason(prompt, "", refusal="content_filter\nno") == "refused"
    assert reason(prompt, "I'm sorry, but I can't help.", tokens=394) == "refused"
    assert reason(prompt, "лис", tokens=394) == "too_long"
    assert "394" in checks.find(prompt, "лис", tokens=394, most_tokens=393).detail
    assert "393" in checks.find(prompt, "лис", tokens=394, most_tokens=393).detail
    assert reason(prompt, "лис", tokens=393) == "lost_text"
    assert reason(prompt, "лис OPEN") == "lost_number"
    assert reason(prompt, "лис OPEN, 3 лиса") == "language"
    assert reason(prompt, "OPEN, 3 foxes") == ""


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m really sorry, but I cannot create this image.",
        "**I can’t assist with that request.**",
        "Sorry, I can't do that.",
        "As an AI language model, I do not draw such things.",
        "Unfortunately, I cannot rewrite it.",
        "Es tut mir leid, dabei kann ich nicht helfen.",
        "Ich kann dir dabei leider nicht helfen.",
        "Désolé, je ne peux pas vous aider.",
        "Je suis désolée, mais c'est impossible.",
        "Lo siento, pero no puedo ayudar con eso.",
        "Mi dispiace, ma non posso aiutarti.",
        "Desculpe, mas não posso ajudar.",
        "Het spijt me, maar dat kan ik niet doen.",
        "Извините, я не могу помочь с этим.",
        "К сожалению, я не могу помочь.",
        "Üzgünüm, bu konuda yardımcı olamam.",
        "抱歉，我无法满足该请求。",
        "很抱歉，我不能帮助你。",
        "申し訳ありませんが、お手伝いできません。",
        "죄송하지만 도와드릴 수 없습니다.",
        "عذرًا، لا أستطيع المساعدة في ذلك.",
        "Maaf, saya tidak bisa membantu.",
        "Przepraszam, ale nie mogę pomóc.",
        "Xin lỗi, tôi không thể giúp.",
    ],
)
def test_refused(answer):
    assert reason("1 fox", answer) == "refused"
    # What goes on is no refusal.
    assert reason("a fox", answer + " A red fox sits in the snow." * 15) != "refused"


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ('a sign "Sorry we\'re closed"', "\"Sorry we're closed\" on a wooden sign in a shop's window"),
        ("a shop's sign: sorry we're closed", "Sorry we're closed, painted on a sign"),
        ('a man who says "I cannot"', 'A man in a grey coat who says "I cannot"'),
        ("Sorry, I'm late: a white rabbit", "Sorry, I'm late: a white rabbit in a waistcoat"),
        ("I'm sorry, a card with roses", "I'm sorry, a card with red roses and gold letters"),
        ("对不起，我爱你 的海报", "对不起，我爱你，一张红色的海报"),
        ("maafa", "Maafa, a painting of ships"),
    ],
)
def test_not_refused(prompt, answer):
    assert reason(prompt, answer) == ""


def test_refused_though_the_prompt_opens_with_an_apology():
    assert reason("I'm sorry, a card with roses", "I'm sorry, but I can't help with that.") == "refused"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign "OPEN", a door "CLOSED"', ["OPEN", "CLOSED"]),
        ("a sign “OPEN”, ‘don’t run’ and „AUF“", ["OPEN", "don’t run", "AUF"]),
        ("»OFFEN« und ‹ZU› und ‚da‘", ["OFFEN", "ZU", "da"]),
        ("une enseigne « Chez Léa »", ["Chez Léa"]),
        ("en skylt ”ÖPPET”", ["ÖPPET"]),
        ("szyld „OTWARTE”", ["OTWARTE"]),
        ("「営業中」の看板と『本』", ["営業中", "本"]),
        ('写着"营业中"的牌子', ["营业中"]),
        ("'영업중'이라고 쓴 간판", ["영업중"]),
        ("a shirt 'SALE', the dogs' house, don't, rock 'n' roll, the '90s", ["SALE"]),
        ("Joe's ('Best of the Beatles' songs')", ["Best of the Beatles"]),
        ('a 6" nail, a 5\'6" man and "HELP"', ["HELP"]),
        ('OPEN" and "IN and "OUT"', ["OUT"]),
        ('a 6"-nail, an 8"-pipe', []),
        ('LEFT" and RIGHT" and "MID"', ["MID"]),
        ("'x \"the dogs' house\" and 'x ' y", ["the dogs' house"]),
        ("\"it's 'so\" and nice' here", ["it's 'so"]),
        ("“He said ‘hi’ to me” on a page", ["hi", "He said ‘hi’ to me"]),
        ("\"A sign that says 'OPEN'\"", ["OPEN"]),
        ("'A cat on a mat'", []),
        ("nothing \"\" '' “” and “ ” here", []),
        ("” » ’ 」 ' a \" b", []),
    ],
)
def test_quoted_texts(prompt, texts):
    assert reason(prompt, prompt) == ""
    # They are all that is asked for.
    numbers = " 6 8 5 90"
    assert reason(prompt, f"{'/'.join(texts)}{numbers}") in ("", "language")
    for text in texts:
        others = [other.replace(text, text.swapcase() + "?") for other in texts]
        if text.swapcase() != text:
            assert reason(prompt, f"{'/'.join(others)}{numbers}") == "lost_text"
        assert reason(prompt, numbers) == "lost_text"


_ALL_MARKS = "\"“”„'‘’‚«»‹›「」『』"


def test_text_within_a_word_is_lost():
    assert reason('a wall with "ART"', "a DART, ARTS and a wall") == "lost_text"
    assert reason('a wall with "ART"', "a DART at a wall") == "lost_text"
    assert reason('a wall with "ART"', "a PARTY at a wall with ART.") == ""
    assert reason("「営業」の看板", "本日営業中の看板") == ""
    assert "BIG" in checks.find('"BIG\nART" on a wall', "BIG ART", tokens=1, most_tokens=2).detail


@pytest.mark.parametrize(
    ("prompt", "lost", "kept"),
    [
        ("3 foxes", "13 foxes, 2.3 m, 3.5 and 30", "exactly 3."),
        ("3 foxes", "three foxes", "foxes (3x)"),
        ("an 8K photo, 35mm", "an 8K photo, 350mm", "35 mm, 8k"),
        ("16:9, the 1920s", "16:10, the 1920s", "1920: 16 to 9"),
        ("1,920 stars", "1,92 stars or 920", "1,920, all of them"),
        ("2.5 m and 1,2,3", "2.5 m and 1, 2", "3, 2, 1 of 2.5 m"),
        ("5.12.2024", "5.12", "2024-12-5"),
        ("３匹の猫", "猫の絵が13枚", "3匹の猫"),
        ("٣ قطط و ٢٫٥", "قطط 3 و 2 و 5", "قطط 3 و 2.5"),
        ("007", "7", "agent 007"),
    ],
)
def test_numbers(prompt, lost, kept):
    assert reason(prompt, lost) == "lost_number"
    assert reason(prompt, kept) == ""
    assert reason(prompt, prompt) == ""


CAT = {
    "Latin": ["a black cat on a red chair", "eine schwarze Katze", "một con mèo đen"],
    "Cyrillic": ["чёрный кот на стуле"],
    "Greek": ["μια μαύρη γάτα"],
    "Arabic": ["قطة سوداء على كرسي"],
    "Hebrew": ["חתול שחור על כיסא"],
    "Devanagari": ["एक काली बिल्ली"],
    "Thai": ["แมวดำบนเก้าอี้"],
    "Hangul": ["의자 위의 검은 고양이"],
    "Japanese": ["椅子の上の黒い猫", "ﾈｺとｲｽ"],
    "Han": ["椅子上的一只黑猫"],
}


def test_language():
    said = [(script, text) for script, texts in CAT.items() for text in texts]
    for (old, prompt), (new, answer) in itertools.product(said, said):
        assert reason(prompt, answer) == ("" if old == new else "language"), (prompt, answer)
    problem = checks.find(CAT["Han"][0], CAT["Latin"][0], tokens=1, most_tokens=2)
    assert "Han" in problem.detail
    assert "Latin" in problem.detail


@pytest.mark.parametrize(
    ("prompt", "answer", "changed"),
    [
        ('写着"WELCOME TO THE MACHINE"的牌子', '木牌上写着"WELCOME TO THE MACHINE"，旁边有树', False),
        ('写着"WELCOME TO THE MACHINE"的牌子', 'a sign that says "WELCOME TO THE MACHINE"', True),
        ("一辆红车", "一辆红色的Volkswagen Transporter停在路边的树下", False),
        ("紅葉、富士山、湖", "紅葉と富士山と湖、朝の光", True),
        ("猫の写真", "猫的照片，红色椅子", True),
        ("一家写着好吃的店", "一家小店，墙上写着好吃的店，灯光温暖，街上有行人和一棵树，の", False),
        ("🐱 + 🐟 = 2", "two cats, 2 fish", False),
        ("a cat", "🐱", False),
        ("ａ ｃａｔ", "𝐚 𝐜𝐚𝐭", False),
    ],
)
def test_language_of_mixed_texts(prompt, answer, changed):
    assert reason(prompt, answer) == ("language" if changed else "")


@pytest.mark.parametrize(
    "unit", ['"', "'", "“", "„", "”", "« ", '"a', "a' ", "'a", '"a ', "“'", "「『", '"“„‘«‹', "1,", "\r", "ich kann "]
)
def test_hostile_prompts_end(unit):
    # Anything quadratic in the marks would take minutes.
    prompt = (unit * 100_000)[:100_000] + "x"
    assert reason(prompt, prompt) == ""
    reason(prompt, "x" * 100_000)
    reason("x", prompt + "»›』」”’\"'" * 1000)


def test_any_text_may_stay_as_it_is():
    rng = random.Random(1)
    for _ in range(2000):
        prompt = "".join(rng.choices(_ALL_MARKS + "ab1. ,3é中\n6", k=rng.randrange(1, 30)))
        assert reason(prompt, prompt) in ("", "empty")


def test_no_quoted_text_is_lost():
    rng = random.Random(0)
    pairs = ['""', "“”", "„“", "«»", "‹›", "「」", "『』", "''", "‘’"]
    seen = 0
    while seen < 200:
        words = ["".join(rng.choices("ABCDEFGHkmnopé", k=rng.randrange(4, 9))) for _ in range(8)]
        texts = [" ".join(words[i : i + 2]) + rng.choice(["", "!", " & Co", ", 50%"]) for i in (0, 2, 4, 6)]
        drawn = [rng.choice(pairs) for _ in texts]
        prompt = "a shop's signs: " + " and ".join(f"{a}{text}{b}" for text, (a, b) in zip(texts, drawn))
        marked = [f"“{text}”" for text in rng.sample(texts, len(texts))]
        assert reason(prompt, f"Four painted signs in the shop's window, {', '.join(marked)}, 50.") == "", prompt
        for lost in texts:
            left = [mark for mark in marked if mark != f"“{lost}”"]
            assert reason(prompt, f"Four painted signs, {', '.join(left)}, {lost.lower()}, 50.") == "lost_text", prompt
        seen += len(texts)
