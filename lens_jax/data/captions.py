"""What a scene shows, in words: in twelve languages, at three densities.

brief   the main noun, nothing else, as an alt text may be
mixed   what is there and how often
dense   everything: sizes, places, relations, the background
"""

from typing import Literal

from lens_jax.data import english
from lens_jax.data.phrases import BACKGROUNDS, PHRASES
from lens_jax.data.scenes import Scene

Density = Literal["brief", "mixed", "dense"]
DENSITIES: tuple[Density, ...] = ("brief", "mixed", "dense")


def caption(scene: Scene, language: str, density: Density = "dense") -> str:
    """True sentences about the scene. Each clause stands for itself, so a list of them is a caption of any language."""
    phrases = PHRASES[language]
    put = lambda pattern, text: pattern.replace("{x}", text)
    names = [placed.concept.names[language] for placed in scene.objects]
    word = put(phrases.word, scene.word.text) if scene.word else ""
    if density == "brief":
        return names[0] if names else word
    counted = len(names) > 1 and len({placed.concept.id for placed in scene.objects}) == 1
    dense = density == "dense"
    if counted:
        clauses = [put({2: phrases.two, 3: phrases.three, 4: phrases.four}[len(names)], names[0])]
    elif dense and scene.relation:
        clauses = [names[0], put(getattr(phrases, scene.relation), names[1])]
    elif dense:
        clauses = []
        for name, placed in zip(names, scene.objects):
            sized = put(getattr(phrases, placed.size), name) if placed.size else name
            clauses.append(put(getattr(phrases, placed.position), sized) if placed.position else sized)
    else:
        clauses = names
    if word:
        position = scene.word.position if dense else ""
        clauses.append(put(getattr(phrases, position), word) if position else word)
    if dense and scene.name_background:
        clauses.append(phrases.backgrounds[BACKGROUNDS.index(scene.background)])
    return phrases.join.join(clauses)


def natural(scene: Scene) -> str:
    """The dense caption as a person would type it in English: "a small fox at the top on a pink background"."""
    names = [placed.concept.names["en"] for placed in scene.objects]
    english_phrases = PHRASES["en"]
    place = lambda text, position: getattr(english_phrases, position).replace("{x}", text) if position else text
    if len(names) > 1 and len({placed.concept.id for placed in scene.objects}) == 1:
        text = english.several(names[0], len(names))
    elif scene.relation:
        relation = getattr(english_phrases, scene.relation).replace("{x}", english.one(names[1]))
        text = f"{english.one(names[0])} {relation}"
    else:
        things = [
            place(english.one(f"{placed.size} {name}".strip()), placed.position)
            for name, placed in zip(names, scene.objects)
        ]
        if scene.word:
            things.append(place(f'the word "{scene.word.text}"', scene.word.position))
        text = english.listed(things)
    if scene.word and len(names) > 1:
        text = english.listed([text, place(f'the word "{scene.word.text}"', scene.word.position)])
    background = english_phrases.backgrounds[BACKGROUNDS.index(scene.background)]
    return f"{text} on {english.one(background)}" if scene.name_background else text
