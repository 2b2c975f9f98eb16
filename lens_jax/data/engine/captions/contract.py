"""The contract of a caption (report, section 2) as a prompt, in our words: the report's own prompt is not published."""

import dataclasses
import hashlib
from collections.abc import Sequence

from lens_jax.data.engine.captions.config import Caption
from lens_jax.llm.request import Image, Message, Request

_DENSE = """\
one English paragraph of 60 to 300 words, in running sentences, that would let a painter who never saw the image \
reproduce it. Say which things are there and how many of each kind; for each thing that matters its colour, texture, \
shape, posture or expression; how things stand to one another and what they do; then the background, the light, the \
viewpoint, and the style or medium. Where you know what something is, name it: a landmark, a well-known person or \
character, a dish, a species, an artwork, a brand. Quote every legible piece of writing exactly as it stands, in \
double quotes and in its own language, and say where it is; if there is none, do not bring up writing at all."""
_BRIEF = 'a few English words that name the main thing in it, such as "a photo of a cat", without a full stop.'
_RULES = """\
You describe images for a catalogue. Write only what can be seen or is known for sure; no guesses, no opinions, no \
mention of "the image" or of what is absent. No introduction, no heading, no list, no markup."""

_ASKS = {
    ("dense",): f"Write a caption of this image: {_DENSE} Answer with the caption alone.",
    ("brief",): f"Write a caption of this image: {_BRIEF} Answer with the caption alone.",
    ("dense", "brief"): (
        f"Write two captions of this image. The first, dense: {_DENSE} The second, brief: {_BRIEF} Answer with one "
        'JSON object and nothing else: {"dense": "...", "brief": "..."}.'
    ),
}
_SHORTEN = f"Here is the description of an image. Write a caption of the same image: {_BRIEF} Answer with it alone."

# Of all that is said above: whoever changes a word gets new captions, and a new name for them.
PROMPT_VERSION = "1-" + hashlib.sha256(repr((_RULES, sorted(_ASKS.items()), _SHORTEN)).encode()).hexdigest()[:8]


@dataclasses.dataclass(frozen=True)
class Task:
    """One call about an image, and the kinds of captions that it gives."""

    kinds: tuple[str, ...]
    # Made of the dense caption's text, without the image.
    of_text: bool = False


def tasks(caption: Caption, kinds: Sequence[str], id: bytes) -> tuple[Task, ...]:
    """What is asked about the image of this id, in turn. "mixed" is dense or brief, by a bit of the id."""
    if "mixed" in kinds:
        kinds = (("dense", "brief")[hashlib.sha256(b"mixed" + id).digest()[0] & 1],)
    if set(kinds) == {"dense", "brief"}:
        of_text = caption.brief_of == "text"
        return (Task(("dense",)), Task(("brief",), of_text=True)) if of_text else (Task(("dense", "brief")),)
    return (Task(tuple(kinds)),)


def request(caption: Caption, task: Task, image: Image | None, dense: str = "", about: str = "") -> Request:
    """The call of a task: with the image, or with the dense caption where it is made of that."""
    said = (_SHORTEN, dense) if task.of_text else (_ASKS[task.kinds], image)
    messages = (Message("system", (_RULES,)), Message("user", said))
    return Request(messages, caption.max_tokens, caption.temperature, about=about)


def text_tokens(task: Task, answer_tokens: int) -> float:
    """Tokens of a call's text, at four characters a token: about right in English."""
    said = len(_SHORTEN) + 4 * answer_tokens if task.of_text else len(_ASKS[task.kinds])
    return (len(_RULES) + said) / 4 + 16
