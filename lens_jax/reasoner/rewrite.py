"""What a reasoner is, and what it says of each prompt: the text to draw, and if that is the prompt itself, why."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

# used: the rewrite is drawn. kept: it says the same. raw: there is no rewrite that can be used.
Status = Literal["used", "kept", "raw"]

# Why a prompt is drawn as it was written.
REASONS = {
    "empty": "the model gave no final answer",
    "truncated": "the answer did not end within its limit",
    "refused": "the model would not answer",
    "too_long": "the rewrite is longer than the text encoder reads",
    "lost_text": "a quoted text of the prompt is not in the rewrite",
    "lost_number": "a number of the prompt is not in the rewrite",
    "language": "the rewrite is in another script than the prompt",
    "timeout": "no answer in time",
    "unreachable": "the server cannot be reached",
    "bad_reply": "the server's reply cannot be read",
    "rate_limited": "the server takes no more questions now",
}


# Why "local" is refused beside a mesh.
ONE_DEVICE = "the local reasoner works on one device; rewrite the prompts first (lens-jax rewrite)"


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """What became of one prompt."""

    # As it was written.
    prompt: str
    # What is to be drawn: the rewrite, or the prompt itself.
    text: str
    status: Status
    # Of `raw`: a key of REASONS, and in a line what was wrong with this one.
    reason: str = ""
    detail: str = ""
    # The model that was asked, and the first 16 hex digits of the SHA-256 of its instructions.
    model: str = ""
    instructions: str = ""
    # Tokens read and written, and seconds until the answer was there; 0 where they are not known.
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0


class Reasoner(Protocol):
    """Rewrites prompts. What fails with one leaves that one as it is; LensError where nothing can be asked at all."""

    def rewrite(self, prompts: Sequence[str], seed: int = 0) -> list[Rewrite]:
        """What becomes of each prompt, in their order. Blank ones are not asked, and kept; LensError for no text."""

    def close(self) -> None:
        """End what it holds open."""
