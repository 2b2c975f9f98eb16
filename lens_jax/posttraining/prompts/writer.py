"""What a language model is asked to write a prompt and its rubrics, and what counts as an answer.

The form is the report's (section 4): a paragraph of 30 to 60 words that pins down the dimensions it was given, and up
to ten rubrics whose names begin with one of five families, to which a global one is always added. The words are ours.
"""

import dataclasses
import json
import re
import unicodedata
from typing import Any

from lens_jax.llm.request import Answer, Message, Request, Unusable
from lens_jax.posttraining.prompts.prompt import Prompt, Rubric
from lens_jax.posttraining.prompts.taxonomy import TEXT, Task

# Part of the manifest: raised when what follows asks for something else.
VERSION = 1

WORDS = (30, 60)
# What is taken of what is asked for: models count badly, and a prompt of 28 words is as good as one of 30.
ACCEPTED_WORDS = (24, 75)
MOST_RUBRICS = 10
FEWEST_RUBRICS = 3

FAMILIES = {
    "Object Count Consistency": "how many of a thing there are, where the text says how many",
    "Object Placement and Spatial Reasoning": "where things are, in the image or in relation to each other",
    "Action Accuracy": "what someone or something does, or is done to",
    "OCR Alignment": "a text that must be readable, quoted letter for letter",
    "Attribute Accuracy": "a thing that must be there, and its colour, material, shape, size, posture or style",
}
STRUCTURAL_INTEGRITY = Rubric(
    "Structural Integrity (Overall)",
    "The whole image is coherent and physically plausible: no part of a body or an object is missing, duplicated, "
    "detached, distorted, floating without support, or merged with another.",
)

_DIMENSIONS = {
    "Attribute": "give at least two things a property that can be seen: material, texture, shape, size, age, posture",
    "Spatial Relationship": "say of at least two things where they are in relation to each other",
    "Count": "give an exact number from two to eight of at least one kind of thing, as a word",
    "Interaction": "let somebody or something act upon something else, as a still image can show it",
    "Color": "name the exact colours of at least two things",
    TEXT: 'one to three short texts must be readable in the image; give each in straight double quotes, as in "OPEN"',
}

_PROMPT_RULES = f"""\
You write prompts for a text-to-image model. Each describes one single image so exactly that a stranger could check \
whether an image shows it.
- One paragraph of {WORDS[0]} to {WORDS[1]} words in plain English, no list, no title, no markup.
- It looks like a photograph, unless the subject is a drawing, a design, a screen or a fantasy.
- Only what can be seen: no sounds, no smells, no thoughts, no names of living people.
- Nothing is left open: no "or", "maybe", "various", "some kind of".
- Double quotes only around texts that are written in the image.
Answer with one JSON object and nothing else: {{"prompt": "...", "texts": ["...", ...]}}, where "texts" has the texts \
that are written in the image, letter for letter as in the prompt, and is empty where there are none."""

_RUBRIC_RULES = (
    "You write the criteria by which an image is judged that was made from a text. Each criterion is about one thing "
    "that the text asks for, can be answered by yes or no from the image alone, and fails if that thing is wrong or "
    "missing. "
    f"Write {FEWEST_RUBRICS} to {MOST_RUBRICS}, the most important first, and nothing that the text does not ask for. "
    "The name of each begins with one of these families, and says in round brackets what it is about, as in "
    '"Attribute Accuracy (red hat)":\n'
    + "\n".join(f"- {name}: {what}" for name, what in FAMILIES.items())
    + "\nEvery text in double quotes gets an OCR Alignment criterion of its own that repeats it in double quotes. "
    "Answer with one JSON object and nothing else, which has the names as keys and as values the criteria, a sentence "
    "each."
)

_FENCE = re.compile(r"\A```\w*\n(.*)\n```\Z", re.DOTALL)
_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


@dataclasses.dataclass(frozen=True)
class Written:
    """A prompt as it was written, before it has rubrics."""

    prompt: str
    texts: tuple[str, ...]


def prompt_request(task: Task, max_tokens: int, temperature: float | None) -> Request:
    item = task.item
    lines = [f"Subject: {item.item} (category {item.category}, {item.subcategory})", "The prompt must:"]
    lines += [f"- {_DIMENSIONS[name]}" for name in task.dimensions]
    if TEXT not in task.dimensions:
        lines.append("- ask for no writing, letters or digits in the image")
    system, user = Message("system", (_PROMPT_RULES,)), Message("user", ("\n".join(lines),))
    return Request((system, user), max_tokens, temperature)


def read_prompt(task: Task, answer: Answer) -> Written:
    """The prompt of an answer, or Unusable, which says what to do better."""
    values = _object(answer, '{"prompt": "...", "texts": [...]}')
    prompt, texts = values.get("prompt"), values.get("texts", [])
    if not isinstance(prompt, str) or not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise _again("no text under prompt, or no list under texts", 'Use the form {"prompt": "...", "texts": [...]}.')
    prompt, texts = prompt.strip(), tuple(dict.fromkeys(text.strip() for text in texts))
    if "\n" in prompt or prompt.startswith(("-", "*", "#", "1.")) or _unprintable(prompt):
        raise _again("more than one paragraph, or markup", "Write one paragraph without markup.")
    count = len(prompt.split())
    if not ACCEPTED_WORDS[0] <= count <= ACCEPTED_WORDS[1]:
        raise _again(f"{count} words", f"It has {count} words. Write {WORDS[0]} to {WORDS[1]}.")
    if (TEXT in task.dimensions) != bool(texts):
        wanted = (
            'Quote one to three texts, and list them under "texts".' if not texts else "Let nothing be written in it."
        )
        raise _again(f"{len(texts)} texts", wanted)
    quoted = quoted_texts(prompt)
    if not all(texts) or set(quoted) != set(texts):
        raise _again(
            f"quotes {list(quoted)} and lists {list(texts)}",
            "Put double quotes around the texts that are written in the image and nothing else, and list just these "
            'under "texts", letter for letter.',
        )
    return Written(prompt, texts)


def rubric_request(written: Written, max_tokens: int, temperature: float | None) -> Request:
    system, user = Message("system", (_RUBRIC_RULES,)), Message("user", (f"Text: {written.prompt}",))
    return Request((system, user), max_tokens, temperature)


def read_rubrics(written: Written, answer: Answer) -> tuple[Rubric, ...]:
    """The rubrics of an answer with the global one added, or Unusable, which says what to do better."""
    values = _object(answer, '{"Attribute Accuracy (red hat)": "..."}')
    rubrics: list[Rubric] = []
    for name, check in values.items():
        check = " ".join(check.split()) if isinstance(check, str) else ""
        if not check or _unprintable(name + check):
            raise _again(f"no sentence under {name!r:.60}", "Give every name one sentence.")
        family, _, about = name.partition("(")
        family, about = family.strip().rstrip(":"), about.strip().rstrip(")").strip()
        known = next((other for other in FAMILIES if other.casefold() == family.casefold()), None)
        if known is None:
            raise _again(f"the family {family!r:.60}", f"Begin every name with one of: {', '.join(FAMILIES)}.")
        rubric = Rubric(f"{known} ({about})" if about else known, check)
        if any(rubric.name == other.name for other in rubrics):
            raise _again(f"two of the name {rubric.name!r:.60}", "Say in the brackets what each is about.")
        rubrics.append(rubric)
    if not FEWEST_RUBRICS <= len(rubrics) <= MOST_RUBRICS:
        raise _again(f"{len(rubrics)} rubrics", f"Write {FEWEST_RUBRICS} to {MOST_RUBRICS}.")
    for text in written.texts:
        if not any(rubric.family == "OCR Alignment" and text in rubric.check for rubric in rubrics):
            raise _again(f"no OCR Alignment of {text!r:.60}", f'Add an OCR Alignment criterion that repeats "{text}".')
    return (*rubrics, STRUCTURAL_INTEGRITY)


def finished(task: Task, written: Written, rubrics: tuple[Rubric, ...]) -> Prompt:
    item = task.item
    return Prompt(
        id=task.id, prompt=written.prompt, category=item.category, subcategory=item.subcategory, item=item.item,
        dimensions=task.dimensions, rubrics=rubrics, texts=written.texts,
    )  # fmt: skip


def quoted_texts(prompt: str) -> tuple[str, ...]:
    """What stands in double quotes, straight or curved, each once."""
    return tuple(dict.fromkeys((a or b).strip() for a, b in _QUOTED.findall(prompt)))


def _object(answer: Answer, form: str) -> dict[str, Any]:
    repair = f"Answer with one JSON object and nothing else, in the form {form}."
    if answer.finish_reason == "length":
        raise Unusable("cut off by max_tokens", repair)
    text = answer.text.rpartition("</think>")[2].strip()
    if fence := _FENCE.match(text):
        text = fence[1]
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise Unusable("not JSON", repair) from None
    if not isinstance(values, dict):
        raise Unusable("not a JSON object", repair)
    return values


def _again(reason: str, repair: str) -> Unusable:
    return Unusable(reason, f"{repair} Answer with the whole JSON object again.")


def _unprintable(text: str) -> bool:
    return any(unicodedata.category(c) in ("Cc", "Cs") for c in text)
