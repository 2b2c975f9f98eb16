"""What captions will take: tokens and money from the sizes of the images, before anything is asked."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lens_jax.data.engine.captions import contract, sent
from lens_jax.data.engine.captions.config import Caption

# A brief answer has so much of a dense one's tokens.
_BRIEF = 1 / 8


@dataclass
class Forecast:
    """Sums over images."""

    images: int = 0
    calls: int = 0
    # Of the questions: their texts, and their images.
    text_tokens: float = 0.0
    image_tokens: float = 0.0
    answer_tokens: float = 0.0

    @property
    def tokens_in(self) -> float:
        return self.text_tokens + self.image_tokens

    def usd(self, caption: Caption) -> float | None:
        """US dollars at the prices of the config; None where it has none."""
        endpoint = caption.endpoint
        return endpoint.usd(self.tokens_in, self.answer_tokens) if any(endpoint.usd_per_million) else None

    def add(self, caption: Caption, tasks: Iterable[contract.Task], height: int, width: int) -> None:
        """Count an image of this size, without a retry."""
        self.images += 1
        for task in tasks:
            self.calls += 1
            self.text_tokens += contract.text_tokens(task, caption.answer_tokens)
            self.image_tokens += 0 if task.of_text else image_tokens(caption, height, width)
            shares = sum(1.0 if kind == "dense" else _BRIEF for kind in task.kinds)
            self.answer_tokens += min(caption.answer_tokens * shares, caption.max_tokens)


def image_tokens(caption: Caption, height: int, width: int) -> float:
    """Tokens that the model takes an image of this size for, after it was made smaller."""
    base, tile, side = caption.image_tokens
    height, width = sent.size(caption, height, width)
    return base + tile * math.ceil(height / side) * math.ceil(width / side)
