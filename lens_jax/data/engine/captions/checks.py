"""Whether an answer is a caption: what is put right without asking again, and what is refused, each for one reason.

The report states the contract (section 2: one English paragraph below 500 words, no word about text that is not
there), not how it was enforced; limits and phrases here are ours.
"""

import json
import re
import unicodedata
import zlib
from collections import Counter

from lens_jax.data.engine.captions import english
from lens_jax.llm.request import Answer, Unusable

# Fewest and most words of each kind.
WORDS = {"dense": (15, 499), "brief": (1, 30)}
# What no answer is read beyond: far more than 500 words.
MAX_CHARACTERS = 20_000
# A run of so many words that comes so often is a loop; so is what deflates to a smaller share than this.
_RUN, _TIMES, _LEAST_RATIO = 8, 3, 0.3

# A model's thoughts, and what it may put around an answer.
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"\A```\w*\n(.*?)\n?```\Z", re.DOTALL)
_REFUSAL = re.compile(
    r"(i['’]?m (so )?sorry|i am (so )?sorry|sorry\b|my apologies|i apologi[sz]e|(unfortunately,? )?(but )?i (can['’]?t|"
    r"can ?not|won['’]?t|will not|could ?n['’]t|am unable|am not able|must decline)\b|i['’]m (unable|not able)\b|"
    r"as an ai\b|"
    r"(this|the) (request|image|content) (violates|cannot be|can['’]t be))",
    re.IGNORECASE,
)
# "Sure! Here is a caption of the image:", "Caption:", "**Dense caption:**".
_OPENING = re.compile(
    r"((sure|certainly|of course|absolutely|okay|ok|great)\b[!,.:]*\s+)?"
    r"((here['’]s|here is|below is|this is)\b[^.:\n]{0,80}:|[*_#\s]*(dense |brief |detailed |image |short )*"
    r"(caption|description)\s*:[*_]*)\s*",
    re.IGNORECASE,
)
_AGREED = re.compile(r"(sure|certainly|of course|absolutely)[!,.:]+\s+", re.IGNORECASE)
_PICTURE = r"(image|picture|photo|photograph|scene|illustration|artwork|drawing|painting)"
# "The image shows a fox": what comes after is the caption.
_SHOWS = re.compile(
    rf"(in )?(the|this) (provided |given |attached )?{_PICTURE},?( (above|below),?)? "
    r"((we|you|one) (can )?sees?|there (is|are)|shows|depicts|features|captures|presents|displays|portrays|contains|"
    r"illustrates|showcases) (?=\S)",
    re.IGNORECASE,
)
# What remains of that kind cannot be cut off: "The image is dark".
_SPEAKS_OF_ITSELF = re.compile(
    rf"((in )?(the|this) (provided |given |attached )?{_PICTURE}\b,? (is|are|was|has|appears|seems|you|we|one|there|"
    r"shows|depicts|features|captures|presents|displays|portrays|contains|illustrates|showcases)\b|here (is|are)\b|"
    r"(caption|description)\s*:)",
    re.IGNORECASE,
)
_TEXT = r"(text|writing|lettering|words?|letters|inscriptions?|captions?|watermarks?|signage|writings)"
_SEEN = r"(visible|legible|readable|discernible|written|identifiable|apparent|overlaid|other|additional)"
# "No visible text", "there isn't any writing", "text is not present".
_NO_TEXT = re.compile(
    rf"\b((no|without|without any|not any|\w*n['’]t any|lacks any|lacks|lacking|devoid of( any)?|free of( any)?|"
    rf"absence of( any)?|not (contain|include|have|feature|show|bear)( any)?|"
    rf"\w*n['’]t (contain|include|have|feature)( any)?)"
    rf" ({_SEEN}[, ]+(and |or )?)*{_TEXT}\b(?! (of|on|from)\b)|"
    rf"{_TEXT} (is|are) ?(not|n['’]t|absent)\b|{_TEXT}: none\b)",
    re.IGNORECASE,
)
_LIST = re.compile(r"^\s*([-*•‣–]|\d{1,2}[.)]|\(?[a-z][.)])\s+\S", re.MULTILINE)
_MARKUP = re.compile(
    r"```|\*\*|__\w|^\s*#{1,6} |^\s*\|.*\|\s*$|</?[a-z][a-z0-9]*( [^<>]*)?/?>|\]\(https?://|\\(text|frac|begin)\b",
    re.IGNORECASE | re.MULTILINE,
)
_QUOTED = re.compile(
    r"\"[^\"]*\"|“[^”]*”|„[^“”]*[“”]|«[^»]*»|「[^」]*」|『[^』]*』|‘[^’]{2,}’(?!\w)|(?<!\w)'[^'\n]{2,}?'(?!\w)"
)


class Rejected(Unusable):
    """No caption; `reason` is one of few words, for counting. Asked again with another seed."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def read(answer: Answer, kinds: tuple[str, ...], repaired: Counter) -> dict[str, str]:
    """The captions in an answer by kind, or `Rejected`. What was put right is counted in `repaired`."""
    if answer.refusal or answer.finish_reason == "content_filter":
        raise Rejected("refusal")
    if answer.finish_reason == "length":
        raise Rejected("cut off")
    text = _THOUGHT.sub("", answer.text[:MAX_CHARACTERS]).strip()
    if fenced := _FENCE.match(text):
        text = fenced[1].strip()
        repaired["fence"] += 1
    if not text:
        raise Rejected("empty")
    if _REFUSAL.match(text):
        raise Rejected("refusal")
    if len(kinds) == 1:
        return {kinds[0]: caption(text, kinds[0], repaired)}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise Rejected("not JSON") from None
    if not isinstance(values, dict) or not all(isinstance(values.get(kind), str) for kind in kinds):
        raise Rejected("not JSON", f"it must have {' and '.join(kinds)}")
    return {kind: caption(values[kind].strip(), kind, repaired) for kind in kinds}


def caption(text: str, kind: str, repaired: Counter) -> str:
    """The text as it is stored, or `Rejected`."""
    if _REFUSAL.match(text):
        raise Rejected("refusal")
    if any(unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") and c not in "\t\n\r" for c in text) or "�" in text:
        raise Rejected("characters")
    text = _without_opening(text, repaired)
    bare = _QUOTED.sub('""', text)
    if _MARKUP.search(bare):
        raise Rejected("markup")
    if len(_LIST.findall(bare)) >= (2 if kind == "dense" else 1):
        raise Rejected("list")
    if "\n" in text:
        repaired["paragraphs joined"] += 1
    text = " ".join(text.split())
    words = text.split()
    fewest, most = WORDS[kind]
    if not fewest <= len(words) <= most:
        raise Rejected("too short" if len(words) < fewest else "too long", f"{len(words)} words")
    if _SPEAKS_OF_ITSELF.match(text):
        raise Rejected("lead-in")
    if loops(words):
        raise Rejected("loop")
    if _NO_TEXT.search(bare):
        raise Rejected("speaks of absent text")
    if not english.is_english(bare):
        raise Rejected("language")
    return text


def _without_opening(text: str, repaired: Counter) -> str:
    """Without quotes around the whole, "Here is a caption:" and "The image shows"."""
    whole = text
    for opening in (_OPENING, _AGREED):
        if match := opening.match(text):
            text = text[match.end() :].lstrip()
    # Quoted as a whole, and not only at both of its ends.
    if len(text) > 2 and text[0] + text[-1] in ('""', "“”") and not set(text[1:-1]) & set('"“”'):
        text = text[1:-1].strip()
    if match := _SHOWS.match(text):
        text = text[match.end() :]
        text = text[:1].upper() + text[1:]
    if text != whole:
        repaired["lead-in cut off"] += 1
    return text


def loops(words: list[str]) -> bool:
    """Whether a model has said the same again and again: a run of words three times, or text that deflates too well."""
    lower = [word.lower() for word in words]
    runs = Counter(tuple(lower[i : i + _RUN]) for i in range(len(lower) - _RUN + 1))
    if runs and max(runs.values()) >= _TIMES:
        return True
    data = " ".join(words).encode("utf-8", "replace")
    return len(zlib.compress(data, 6)) < _LEAST_RATIO * len(data)
