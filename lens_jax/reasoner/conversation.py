"""Harmony conversations of the reasoner, written and read by token ids.

By ids and not by text, since a prompt may hold any text: with control tokens written out and regular expressions, as
the release reads its answers, a prompt with the words "assistant final" loses what stands before them, and an answer
that was cut off in the model's thoughts is taken for a prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

from lens_jax.encoders import harmony
from lens_jax.encoders.harmony import CHANNEL, END, MESSAGE, START, STOP
from lens_jax.encoders.tokenizer import HarmonyTokenizer
from lens_jax.models.generate import Opening

FINAL = "final"


class Final(NamedTuple):
    """The answer in what a model has written."""

    # Empty where there is none.
    text: str
    # Whether it was ended by the model, and not by a limit.
    ended: bool


def beginning(tokenizer: HarmonyTokenizer, instructions: str, date: str) -> list[int]:
    """Ids of a conversation up to and with the header of the user's turn."""
    return tokenizer.encode_pieces(harmony.chat_frame(instructions, date, "low").prefix)


def question(tokenizer: HarmonyTokenizer, prompt: str) -> list[int]:
    """Ids of the user's turn behind its header, and of the header of the answer."""
    return [*tokenizer.encode(prompt), *tokenizer.encode_pieces((END, START, "assistant"))]


def question_again(tokenizer: HarmonyTokenizer, prompt: str, answer: str, wanted: str) -> list[int]:
    """As `question`, of a conversation that goes on: an answer that cannot be used, and what is wanted instead."""
    said = (END, START, "assistant", CHANNEL, FINAL, MESSAGE)
    between = tokenizer.encode_pieces((END, START, "user", MESSAGE))
    return [
        *tokenizer.encode(prompt), *tokenizer.encode_pieces(said), *tokenizer.encode(answer), *between,
        *question(tokenizer, wanted),
    ]  # fmt: skip


def opening(tokenizer: HarmonyTokenizer, before: int, limit: int) -> Opening:
    """How an answer is opened: by the header of the final channel, put in after `before` tokens of thoughts."""
    header = tuple(tokenizer.encode_pieces((CHANNEL, FINAL, MESSAGE)))
    forced = tuple(tokenizer.encode_pieces((END, START, "assistant", CHANNEL, FINAL, MESSAGE)))
    return Opening(header, forced, before, limit)


def final(tokenizer: HarmonyTokenizer, ids: Sequence[int]) -> Final:
    """The last message of the final channel in what a model has written behind the header of its turn.

    One that was cut off does not take the place of one that was ended.
    """
    name_of = {token: name for name, token in tokenizer.control.items()}
    # Channel and content of the message that is being read: None outside of each.
    channel: list[int] | None = None
    content: list[int] | None = None
    found = Final("", False)
    for token in map(int, ids):
        name = name_of.get(token)
        if name is None:
            into = channel if content is None else content
            if into is not None:
                into.append(token)
            continue
        if content is not None and _is_final(tokenizer, channel):
            ended = name == END or name in STOP
            found = Final(tokenizer.decode(content), ended) if ended or not found.ended else found
        if name == CHANNEL:
            channel, content = [], None
        elif name == MESSAGE:
            content = []
        elif content is not None or name in (START, END, *STOP):
            channel, content = None, None
        if name in STOP:
            return found
    if content is not None and _is_final(tokenizer, channel) and not found.ended:
        return Final(tokenizer.decode(content), False)
    return found


def _is_final(tokenizer: HarmonyTokenizer, channel: list[int] | None) -> bool:
    # A header may say more behind the name: "final <|constrain|>json".
    return channel is not None and tokenizer.decode(channel).split()[:1] == [FINAL]
