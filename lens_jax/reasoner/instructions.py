"""What a language model is told that rewrites prompts.

Ours, to the contract of the release's system prompt: one description of one scene, nothing lost and nothing important
added, several alike told apart, inference made visible, the language kept. Benchmarks have none of their own here:
instructions that were searched on a benchmark's prompts are a part of its score (report 5).
"""

import hashlib
from pathlib import Path

from lens_jax.errors import LensError

INSTRUCTIONS = """\
You turn a user's request into the prompt of an image generator.

Write one description of a single image, in plain sentences, of at most 250 words.

Keep everything that was asked for: every object, how many of each, colors, materials, actions, places relative to \
each other, the setting, style and medium. Write numbers given in digits as digits. Copy any text that is to be seen \
in the image exactly, character by character, in the same quotation marks.

Add only what makes the scene concrete: shapes, sizes, textures, light, background, viewpoint. Do not add another \
subject, person, logo or text of importance. Where several subjects of one kind are asked for, describe each of them \
by its own look, pose and place, so that they can be told apart.

Where the request implies something that can only be meant in one way, say what is seen: of a sum on a blackboard, \
its result; of a season, its trees. Invent nothing else. A request that is detailed already stays as it is, but for \
what is unclear.

Say what is there, not what might be: no alternatives, no hedging, no questions, no remarks about the task.

Answer in the language of the request. Output the description alone: no title, list, markup, explanation, or quotation \
marks around the whole."""

_LONGEST = 1 << 16


def digest(instructions: str) -> str:
    """The first 16 hex digits of the SHA-256 of instructions, by which a rewrite names them."""
    return hashlib.sha256(instructions.encode()).hexdigest()[:16]


def read(path: str) -> str:
    """The instructions in a text file, or ours where `path` is empty. LensError for a file that cannot be used."""
    if not path:
        return INSTRUCTIONS
    try:
        with Path(path).open("rb") as file:
            data = file.read(_LONGEST + 1)
        if len(data) > _LONGEST:
            raise LensError(f"{path}: is longer than 64 KiB; instructions for a language model are needed")
        text = data.decode("utf-8-sig").strip()
    except OSError as error:
        raise LensError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LensError(f"{path}: is no text in UTF-8; instructions for a language model are needed") from None
    if not text:
        raise LensError(f"{path}: is empty; instructions for a language model are needed")
    return text
