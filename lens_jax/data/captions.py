"""What a scene shows, in words: in twelve languages, at three densities.

brief   the main noun, nothing else, as an alt text may be
mixed   what is there and how often
dense   everything: sizes, places, relations, the background
"""

from typing import Literal

from lens_jax.data import english
from lens_jax.data.phrases import BACKGROUNDS, PHRASES, Phrases
from lens_jax.data.scenes import Scene

Density = Literal["brief", "mixed", "dense"]
DENSITIES: tuple[Density, ...] = ("brief", "mixed", "dense")


def caption(scene: Scene, language: str, density: Density = "dense") -> str:
    """What is true of the scene, clause by clause: "fox (small, on the left), pink background"."""
    phrases = PHRASES[language]
    names = [placed.concept.names[language] for placed in scene.objects]
    word = phrases.word.replace("{x}", scene.word.text) if scene.word else ""
    if density == "brief":
        return names[0] if names else word
    said = lambda thing, *what: _with(thing, [getattr(phrases, one) for one in what if one], phrases)
    dense = density == "dense"
    if is_group(scene):
        clauses = [said(names[0], {2: "two", 3: "three", 4: "four"}[len(names)])]
    elif dense and scene.relation:
        clauses = [names[0], getattr(phrases, scene.relation).replace("{x}", names[1])]
    elif dense:
        clauses = [said(name, placed.size, placed.position) for name, placed in zip(names, scene.objects)]
    else:
        clauses = names
    if word:
        clauses.append(said(word, scene.word.position if dense else ""))
    if dense and scene.name_background:
        clauses.append(phrases.backgrounds[BACKGROUNDS.index(scene.background)])
    return phrases.join.join(clauses)


def is_group(scene: Scene) -> bool:
    """Whether it shows one thing several times."""
    return len(scene.objects) > 1 and len({placed.concept.id for placed in scene.objects}) == 1


def _with(thing: str, what: list[str], phrases: Phrases) -> str:
    """ "fox (small, on the left)"."""
    if not what:
        return thing
    *before, opening, closing = phrases.brackets
    return f"{thing}{''.join(before)}{opening}{phrases.join.join(what)}{closing}"


def natural(scene: Scene) -> str:
    """The dense caption as a person would type it in English: "a small fox at the top on a pink background"."""
    phrases = PHRASES["en"]
    names = [placed.concept.names["en"] for placed in scene.objects]
    at = lambda text, position: f"{text} {getattr(phrases, position)}" if position else text
    if is_group(scene):
        things = [english.several(names[0], len(names))]
    elif scene.relation:
        relation = getattr(phrases, scene.relation).replace("{x}", english.one(names[1]))
        things = [f"{english.one(names[0])} {relation}"]
    else:
        things = [
            at(english.one(f"{placed.size} {name}".strip()), placed.position)
            for name, placed in zip(names, scene.objects)
        ]
    if scene.word:
        things.append(at(f'the word "{scene.word.text}"', scene.word.position))
    background = phrases.backgrounds[BACKGROUNDS.index(scene.background)]
    text = english.listed(things)
    return f"{text} on {english.one(background)}" if scene.name_background else text
