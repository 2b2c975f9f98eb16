"""What must hold of a rewrite before it is drawn in place of its prompt.

A rewrite may add, but it may not refuse, run over the encoder's length, drop a text that is to be written in the
picture or a number, or change the script. All checks are about characters: none knows a word of any language, but for
the openings of refusals. Where it is not certain that something is a quotation, it is taken for none.
"""

import itertools
import re
import unicodedata
from collections import Counter
from typing import NamedTuple

from lens_jax.llm.retry import one_line

_DETAIL = 120
# A refusal says little else: about 60 words.
_SHORT = 400
# Line feeds and tabs are blanks of a prompt, and every other line end becomes a line feed.
_LINE_END = re.compile("\r\n?|[\v\f\x85\u2028\u2029]")
_CONTROLS = dict.fromkeys(i for i in (*range(0x20), *range(0x7F, 0xA0)) if chr(i) not in "\t\n")

# What ends a quotation, by what begins it.
_CLOSERS = {'"': '"', "“": "”", "„": "“”", "”": "”", "'": "'", "‘": "’", "‚": "‘’"} | dict(zip("«»‹›「『", "»«›‹」』"))
_MARKS = re.compile(f"[{''.join(sorted({*_CLOSERS, *''.join(_CLOSERS.values())}))}]")
# Apostrophes that begin a word and no quotation: rock 'n' roll, the '90s. A number is looked for anyway.
_ELISION = re.compile(r"(?:[nN]|em|til|tis|twas|cause|\d\ds?)(?!\w)")

_NUMBER = re.compile(r"[0-9]+(?:[.,][0-9]+)*")
# Of "1,2,3", "1.2.3" and dates each part is a number.
_ONE_NUMBER = re.compile(
    r"[0-9]+(?:[.,][0-9]+)?|[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]{1,3}(?:\.[0-9]{3})+(?:,[0-9]+)?"
)

_SCRIPTS = {"CJK": "Han", "IDEOGRAPHIC": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "KATAKANA-HIRAGANA": "Kana"}
# In letters of an alphabet: else a brand name and a lens would outweigh a Chinese sentence.
_WORTH = {"Han": 3, "Kana": 2, "Hangul": 2}

# How refusals open, in lower case and with straight apostrophes. In English as long as they can be, since a prompt that
# opens alike is let through: a card that says "I'm sorry" is not "I'm sorry, but I can't".
_CANNOT = r"i (?:can't|cannot|can not|couldn't|could not|won't|will not|am unable|am not able)|i'm (?:unable|not able)"
_WORDS = (
    r"(?:(?:i'm|i am) (?:very |so |truly |really )?sorry|my apologies|i apologi[sz]e|sorry(?=,| but)"
    rf"|unfortunately(?=,? (?:i|we)\b)|as an ai(?: language model| model| assistant)?(?=,| i\b))"
    rf"(?:[,.;]? (?:but )?(?:{_CANNOT}))?|{_CANNOT}",
    r"(?:es )?tut mir (?:sehr |wirklich )?leid|entschuldigung|entschuldigen sie|leider (?:kann|darf|ist es mir)|als ki",
    r"ich kann (?:\w+ ){0,4}nicht|(?:je suis )?(?:vraiment )?désolée?|je m'excuse|je ne (?:peux|puis) pas",
    r"malheureusement,? je|en tant qu'ia|lo siento|lo lamento|no puedo|(?:perdón|disculpe?|disculpa)(?=,)|como ia",
    r"lamentablemente,? no|mi dispiace|non posso|scusa(?:mi)?(?=,)|purtroppo,? non|sono spiacente|in quanto ia",
    r"(?:desculpe?|lamento)(?=,| mas)|sinto muito|não posso|infelizmente,? (?:eu )?não",
    r"het spijt me|ik kan (?:\w+ ){0,4}niet|helaas kan ik|als ai",
    r"извините?|простите?|прошу прощения|к сожалению|я не могу|мне (?:очень )?жаль",
    r"üzgünüm|maalesef|özür dilerim|ne yazık ki|maaf|(?:saya )?(?:mohon|minta) maaf|saya tidak (?:dapat|bisa)",
    r"przepraszam|niestety|przykro mi|nie mogę|(?:tôi )?(?:rất )?xin lỗi|rất tiếc|tôi không thể",
    r"(?:أنا )?(?:آسف|آسفة)|عذر(?:ا|ًا|اً)|أعتذر|لا (?:أستطيع|يمكنني)|للأسف",
)
# Here what follows need not be a blank.
_SIGNS = (
    "(?:很|非常)?(?:抱歉|对不起|對不起)|我(?:无法|無法|不能)|申し訳|すみません|ごめんなさい|恐れ入りますが|죄송|미안"
)
_REFUSALS = re.compile(rf"(?:{'|'.join(_WORDS)})(?!\w)|{_SIGNS}")


class Problem(NamedTuple):
    """Why a rewrite cannot be drawn."""

    # A key of REASONS.
    reason: str
    # In one printable line what was lost or found.
    detail: str


def normalised(answer: str) -> str:
    """An answer as the one prompt that it is: no blanks around it, no control characters, line ends as line feeds.

    Nothing else is taken away. Quotation marks around it, or words that look like a heading, may be the picture's.
    """
    return _LINE_END.sub("\n", answer).translate(_CONTROLS).strip()


def same(prompt: str, text: str) -> bool:
    """Whether they differ in blanks at most."""
    return prompt.split() == text.split()


def find(prompt: str, answer: str, *, tokens: int, most_tokens: int, refusal: str = "") -> Problem | None:
    """The first of what is wrong with an answer as the rewrite of a prompt; None where it can be drawn.

    `tokens` is the answer's length and `most_tokens` what the text encoder reads. `refusal` is the server's own word
    that the model would not answer; with it the answer is mostly empty, so it comes first. Then in this order:
    empty; refused, in words; too_long; lost_text, character for character; lost_number; language.

    A number that the rewrite spells out ("three" for 3) is lost, as words are not known in every language. A change
    from one Latin language to another is not seen. Takes any two strings and raises nothing; the time is linear in the
    prompt, as an answer that is searched is not too long.
    """
    prompt, answer = normalised(prompt), normalised(answer)
    if refusal.strip():
        return _problem("refused", refusal)
    # Characters without a width are no prompt either.
    if not any(c.isprintable() and not c.isspace() for c in answer):
        return _problem("empty", "the answer is blank")
    opening = _refusal(answer)
    if opening and len(answer) <= _SHORT and opening != _refusal(prompt):
        return _problem("refused", answer)
    if tokens > most_tokens:
        return _problem("too_long", f"{tokens} tokens, and the text encoder reads {most_tokens}")
    spans = _quotations(prompt)
    # In their order, each once.
    for text in dict.fromkeys(prompt[start:end].strip() for start, end in spans):
        if text and not _holds(answer, text):
            return _problem("lost_text", f'"{text}" is not in the rewrite')
    kept = set(_numbers(answer))
    for number in _numbers(prompt):
        if number not in kept:
            return _problem("lost_number", f"{number} is not in the rewrite")
    before = _letters(_outside(prompt, spans))
    after = _letters(_outside(answer, _quotations(answer)))
    if _script_changed(before, after):
        return _problem("language", f"the prompt is in {_main(before)} script, the rewrite in {_main(after)}")
    return None


def _problem(reason: str, detail: str) -> Problem:
    return Problem(reason, one_line(detail, longest=_DETAIL))


def _refusal(text: str) -> str:
    """The apology or refusal that a text opens with, as the pattern has it."""
    opening = unicodedata.normalize("NFC", text[:120]).lower().replace("’", "'")
    match = _REFUSALS.match(" ".join(opening.split()).lstrip("*_#> "))
    return match[0] if match else ""


def _quotations(text: str) -> list[tuple[int, int]]:
    """Where the insides of all quotations are, nested ones before what is around them.

    One that is the whole text is none: so a prompt is wrapped, and nothing to be written. Of each kind of mark only
    one can be open: of two that open, the first was never closed. So the insides are at most len(text) long in all,
    times the kinds.
    """
    found, opened = [], {}
    for match in _MARKS.finditer(text):
        mark, at = match[0], match.start()
        # Empty at the ends of the text.
        before, after = text[max(0, at - 1) : at], text[at + 1 : at + 2]
        opener = max((o for o in opened if mark in _CLOSERS[o]), key=opened.__getitem__, default="")
        # An apostrophe ends nothing but what opened last: "the dogs' house" may be within other marks.
        last = bool(opener) and opened[opener] == max(opened.values())
        if opener and (last or mark not in "'’") and _closes(opener, mark, before, after):
            start = opened[opener]
            if (start, at) != (0, len(text) - 1):
                found.append((start + 1, at))
            opened = {o: i for o, i in opened.items() if i < start}
        elif mark in _CLOSERS and _opens(mark, before, after) and not (mark in "'‘" and _ELISION.match(text, at + 1)):
            opened[mark] = at
    return found


def _closes(opener: str, mark: str, before: str, after: str) -> bool:
    if mark in "'’":
        return not _blank(before) and not _of_word(after)
    # Where one mark does both, it opens if only what follows is close to it.
    return opener != mark or not _blank(before) or _blank(after)


def _opens(mark: str, before: str, after: str) -> bool:
    if mark == '"':
        # Behind a number it means inches.
        return not before.isdigit() and (_blank(before) or not _blank(after))
    # Each of these closes in most countries and opens in some.
    return mark not in "'”»›" or (not _of_word(before) and not _blank(after))


def _blank(character: str) -> bool:
    return not character or character.isspace()


def _of_word(character: str) -> bool:
    """A letter, sign or digit, but of those scripts that set no blanks between words or between a word and a mark."""
    if not character or unicodedata.category(character)[0] not in "LNM":
        return False
    # Thai and Lao; Burmese; Hangul; Khmer; all from the radicals of Han on.
    return not re.match("[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\U0010ffff]", character)


def _holds(answer: str, text: str) -> bool:
    """Whether a text is in the answer, and not within a word: "ART" is not in "PARTY"."""
    # Case tells words that are parted by blanks from those that are not.
    joined = lambda left, right: left.lower() != left.upper() and right.lower() != right.upper()
    return any(
        not joined(before[-1:], text[0]) and not joined(text[-1], after[:1])
        for before, after in itertools.pairwise(answer.split(text))
    )


def _numbers(text: str) -> list[str]:
    """All numbers in digits as they are written, in ASCII digits."""
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
        text = text.replace("٫", ".").replace("٬", ",")
    found = []
    for number in _NUMBER.findall(text):
        found += [number] if _ONE_NUMBER.fullmatch(number) else re.split("[.,]", number)
    return found


def _outside(text: str, spans: list[tuple[int, int]]) -> str:
    """The text without its quotations."""
    parts, end = [], 0
    for start, stop in sorted(spans):
        parts.append(text[end:start])
        end = max(end, stop)
    return "".join([*parts, text[end:]])


def _letters(text: str) -> Counter:
    """How many letters of each script a text has."""
    counts: Counter = Counter()
    for character, count in Counter(text).items():
        if character.isalpha():
            # Full-width, bold and such letters as plain ones.
            name = unicodedata.name(unicodedata.normalize("NFKC", character)[0], "").partition(" ")[0]
            counts[_SCRIPTS.get(name, name.capitalize())] += count
    return counts


def _main(letters: Counter) -> str:
    """The script of most letters, of which Japanese is one: Han with any kana. "" of none."""
    worth = {script: count * _WORTH.get(script, 1) for script, count in letters.items()}
    if worth.get("Kana"):
        worth["Japanese"] = worth.pop("Kana") + worth.pop("Han", 0)
    return max(worth, key=worth.__getitem__, default="")


def _script_changed(before: Counter, after: Counter) -> bool:
    """Han alone may be Japanese too, and Chinese may hold a kana or two: up to a tenth of kana is no change."""
    old, new = _main(before), _main(after)
    if old == "Han" and new == "Japanese":
        return after["Kana"] * 10 > after.total()
    return bool(old and new) and old != new
