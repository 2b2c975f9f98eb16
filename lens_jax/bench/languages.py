"""`lens-jax bench languages`: what the text encoder carries over to languages that were never trained on.

A model that was trained on captions of some languages knows a clause of another only by the clause of theirs that its
vector is near to. So without any model: of the prompts of the scene benchmark, how many have every clause nearest to
one of its own meaning, among all clauses of the trained languages. What a model draws in such a language can be
compared with that, and what it gets wrong be told from what the encoder had lost before it.
"""

import dataclasses
from collections.abc import Sequence

from lens_jax.bench import measure
from lens_jax.checker.tasks import TASKS, bench_prompts
from lens_jax.data import captions
from lens_jax.data.buckets import make_buckets
from lens_jax.data.phrases import LANGUAGES, PHRASES
from lens_jax.data.scenes import Concept
from lens_jax.data.sources import openmoji
from lens_jax.encoders.sentence import SentenceEncoderConfig, split_prompt
from lens_jax.errors import LensError, nearest

# Clauses of a prompt, of which no caption of a scene has as many.
_ROOM = 64
_BESIDES = ("word", "backgrounds", "join", "brackets")


@dataclasses.dataclass(frozen=True)
class LanguagesBench:
    """Prompts that the text encoder carries over from one language to others."""

    # Languages whose prompts are looked at.
    languages: tuple[str, ...] = ("it", "ru", "ja", "ko")
    # Languages whose captions were trained on.
    trained: tuple[str, ...] = ("en", "de", "es", "fr", "zh")
    # Prompts of each task without words, those of `lens-jax evaluate --bench scenes --sizes 64x64`, and their seed.
    count: int = 5
    seed: int = 0
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "count")
        for language in (*self.languages, *self.trained):
            if language not in LANGUAGES:
                known = ", ".join(LANGUAGES)
                raise LensError(f"language {language!r}{nearest(language, LANGUAGES)}; accepted: {known}")


def bench_languages(bench: LanguagesBench) -> dict:
    """Encode all clauses, print and return what is carried over."""
    concepts = openmoji.load_concepts(len(openmoji.CONCEPTS))
    encoder = SentenceEncoderConfig(max_tokens=1).load()
    vectors_of = lambda clauses: encoder.tokens(list(clauses)).values[:, 0]
    known: dict[str, set] = {}
    for language in bench.trained:
        for clause, meanings in _clauses(concepts, language).items():
            known.setdefault(clause, set()).update(meanings)
    vectors = vectors_of(known)
    tasks = [task for task in TASKS if not task.startswith("text")]
    prompts = bench_prompts(concepts, make_buckets(64, ("1:1",), 8), tasks, bench.count, bench.seed)

    result: dict = {"clauses of trained languages": len(known), "prompts": len(prompts)}
    for language in bench.languages:
        meanings = _clauses(concepts, language)
        parts = [split_prompt(captions.caption(prompt.scene, language), _ROOM) for prompt in prompts]
        asked = sorted({clause for clauses in parts for clause in clauses})
        nearest_one = (vectors_of(asked) @ vectors.T).argmax(-1)
        understood = {clause: list(known.values())[i] for clause, i in zip(asked, nearest_one)}
        right = [[bool(understood[clause] & meanings[clause]) for clause in clauses] for clauses in parts]
        names = {clause for clause in asked if any(meaning[0] == "name" for meaning in meanings[clause])}
        of_names = [one for row, clauses in zip(right, parts) for one, clause in zip(row, clauses) if clause in names]
        result[language] = (
            f"{sum(map(all, right))} of {len(prompts)} prompts; {_share(of_names)} names, "
            f"{_share([one for row in right for one in row])} clauses"
        )
    return measure.report(bench, result)


def _clauses(concepts: Sequence[Concept], language: str) -> dict[str, set[tuple[str, ...]]]:
    """Every clause of a language as the encoder gets it, with what it can mean: ("name", "fox"), ("left",), ..."""
    phrases, found = PHRASES[language], {}

    def add(text: str, *meaning: str) -> None:
        for clause in split_prompt(text, _ROOM):
            found.setdefault(clause, set()).add(meaning)

    for concept in concepts:
        add(concept.names[language], "name", concept.id)
    for field in (field.name for field in dataclasses.fields(phrases) if field.name not in _BESIDES):
        text = getattr(phrases, field)
        if "{x}" not in text:
            add(text, field)
        elif language == "en":  # "above", "fox": the encoder's rules know the joints of English
            add(text.replace("{x}", "").strip(), field)
        else:
            for concept in concepts:
                add(text.replace("{x}", concept.names[language]), field, concept.id)
    for number, text in enumerate(phrases.backgrounds):
        add(text, "background", str(number))
    return found


def _share(right: Sequence[bool]) -> str:
    return f"{sum(right)} of {len(right)}"
