"""The Harmony conversation of the release, written out.

GPT-OSS reads a prompt as the user's turn of a chat, and the denoiser was trained on the hidden states of that chat.
The text is fixed but for the prompt and a date. The date sits in the part whose features are dropped, yet the kept
positions attend to it, so it changes the image: it is an argument here and never read from the clock.
"""

import datetime
from typing import NamedTuple

from lens_jax.errors import LensError

SYSTEM = (
    "You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\n"
    "Current date: {date}\n\n"
    "Reasoning: {effort}\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
INSTRUCTIONS = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background."
)
THINK = "Need to generate one image according to the description."

# Tokens before the prompt: their features are dropped. Every ISO date has the same number of tokens.
PREFIX_TOKENS = 97
# Tokens after the prompt: they reach the denoiser.
SUFFIX_TOKENS = 22
# Tokens in all; what is left for the prompt is 393.
MAX_TOKENS = 512
PROMPT_TOKENS = MAX_TOKENS - PREFIX_TOKENS - SUFFIX_TOKENS
# What other ports pin (ComfyUI, mflux); the original takes the day it runs.
DEFAULT_DATE = "2026-05-23"

EFFORTS = ("low", "medium", "high")


class Control(str):
    """A control token such as `<|start|>`: one id, unlike the same characters inside a prompt."""


START, MESSAGE, CHANNEL, END = (Control(f"<|{name}|>") for name in ("start", "message", "channel", "end"))
PAD = Control("<|endoftext|>")
# GPT-OSS ends an answer with one of these; the last one ends whatever it is in.
STOP = (Control("<|return|>"), Control("<|call|>"), PAD)


class Frame(NamedTuple):
    """What stands around a prompt: pieces of plain text and control tokens."""

    # Up to and with the header of the user's turn.
    prefix: tuple[str, ...]
    # From the end of the user's turn on.
    suffix: tuple[str, ...]


def image_frame(date: str) -> Frame:
    """The chat of the image pipeline around its prompt, for a date YYYY-MM-DD; LensError for anything else."""
    thought = (START, "assistant", CHANNEL, "analysis", MESSAGE, THINK, END)
    answer = (START, "assistant", CHANNEL, "final", MESSAGE)
    return Frame(_opening(INSTRUCTIONS, date, "medium"), (END, *thought, *answer))


def chat_frame(instructions: str, date: str, effort: str = "low") -> Frame:
    """A chat whose answer is to be generated, around the user's message: the prompt reasoner (release: reasoner)."""
    return Frame(_opening(instructions, date, effort), (END, START, "assistant"))


def render(prompt: str, date: str) -> str:
    """The whole text of the image pipeline for one prompt, as the chat template of the release renders it."""
    frame = image_frame(date)
    return "".join((*frame.prefix, prompt, *frame.suffix))


def check_date(date: str) -> str:
    """The date itself when it is YYYY-MM-DD, LensError otherwise."""
    try:
        if datetime.date.fromisoformat(date).isoformat() == date:
            return date
    except (TypeError, ValueError):
        pass
    raise LensError(f"date is {date!r}; a day as YYYY-MM-DD is needed, e.g. {DEFAULT_DATE}")


def _opening(instructions: str, date: str, effort: str) -> tuple[str, ...]:
    if effort not in EFFORTS:
        raise LensError(f"reasoning effort is {effort!r}; accepted: {', '.join(EFFORTS)}")
    system = SYSTEM.format(date=check_date(date), effort=effort)
    developer = f"# Instructions\n\n{instructions}\n\n"
    return (START, "system", MESSAGE, system, END, START, "developer", MESSAGE, developer, END, START, "user", MESSAGE)
