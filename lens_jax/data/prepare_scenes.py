"""Make a data set of pictograms and words composed into scenes, written as shards by stream."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lens_jax.atomic import new_directory
from lens_jax.data import captions, images, lettering, phrases, scene_sampler, scenes
from lens_jax.data.buckets import Bucket, make_buckets
from lens_jax.data.index import NAME, SPLITS
from lens_jax.data.prepare_report import plain, report
from lens_jax.data.prepare_report import progress as show_progress
from lens_jax.data.records import Record, encode
from lens_jax.data.scene_sampler import World
from lens_jax.data.sources import openmoji
from lens_jax.data.writer import DataWriter
from lens_jax.errors import LensError, nearest

# Kept out of training where nothing else is said.
HELD_OUT = ("it", "ja", "ko", "ru")


@dataclass(frozen=True)
class OpenMojiConfig:
    """Pictograms, alone and composed into scenes, captioned in up to twelve languages."""

    # Directory to write; it must not exist yet.
    out: str = "data/openmoji"
    # How many concepts (1 to 128), the most distinct first.
    concepts: int = 64
    # Images have about size² pixels.
    size: int = 48
    # Aspect ratios W:H, one bucket each.
    ratios: tuple[str, ...] = ("1:1", "3:4", "4:3")
    # Both sides of every bucket are multiples of this many pixels.
    tile: int = 8
    # What scenes hold. objects: one to three of them, their places and backgrounds; all: up to four, sizes, relations
    # ("a fox to the left of a house") and written words as well.
    world: World = "objects"
    # Composed scenes in the train split.
    scenes: int = 3000
    # Canonical images (one object on white, captioned by its name) of each concept in each bucket.
    copies: int = 20
    # How often a caption is brief (the main noun), mixed (what is there) or dense (everything).
    densities: tuple[float, float, float] = (0.0, 0.0, 1.0)
    # How often a dense English caption is a sentence ("two foxes on a pink background") and not a list of clauses.
    natural: float = 0.0
    # Keep one combination of twelve out of the train split: pairs of concepts, counts, backgrounds, words.
    hold_out: bool = False
    # Draw outlines without their colours, a style to adapt to.
    style: openmoji.Style = "colour"
    # Caption languages.
    languages: tuple[str, ...] = ("en", "de", "es", "fr", "zh", "it", "ja", "ko", "ru")
    # Of these, the ones kept out of the train captions, to see what the text encoder transfers; by default it, ja, ko
    # and ru, those of them that there are.
    holdout_languages: tuple[str, ...] | None = None
    # Scenes in the validation split; none of their captions is in the train split.
    validation: int = 256
    # Seed of the scenes.
    seed: int = 0
    # Replace a data set that is already there.
    overwrite: bool = False


def prepare_openmoji(config: OpenMojiConfig, progress: bool = True) -> Path:
    """Write the pictogram data set to config.out and return that path. Same config, same records."""
    if config.holdout_languages is None:
        held = tuple(name for name in HELD_OUT if name in config.languages)
        config = replace(config, holdout_languages=held)
    _check(config)
    concepts = openmoji.load_concepts(config.concepts)
    buckets = make_buckets(config.size, config.ratios, config.tile)
    sprite = openmoji.sprites_for(concepts, buckets, config.style)
    train_languages = tuple(name for name in config.languages if name not in config.holdout_languages)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([config.seed, len(SPLITS)])))

    total = config.concepts * len(buckets) * config.copies + config.scenes + config.validation
    with new_directory(config.out, config.overwrite, NAME) as directory, DataWriter(directory, buckets) as writer:
        for split, scene in show_progress(_scenes(config, concepts, buckets), total, "drawing", progress):
            languages = train_languages if split == "train" else config.languages
            record = Record(
                image=images.encode_image(scenes.draw(scene, sprite), "png"),
                captions={language: (_caption(scene, language, split, config, rng),) for language in languages},
                height=scene.bucket.height,
                width=scene.bucket.width,
                source="openmoji",
                licence=openmoji.LICENCE,
                meta=scenes.scene_meta(scene),
            )
            writer.write(split, scene.bucket, 0, encode(record), languages)
        names = [
            {"id": c.id, "code_point": f"U+{openmoji.CODE_POINTS[c.id]:04X}", "names": dict(c.names)} for c in concepts
        ]
        text = json.dumps(names, ensure_ascii=False, indent=1) + "\n"
        (directory / "concepts.json").write_text(text, encoding="utf-8")
        writer.finish(
            source="openmoji",
            config=plain(config),
            licence=openmoji.LICENCE,
            languages=train_languages,
            holdout_languages=config.holdout_languages,
        )
    return report(config.out, progress)


def _caption(scene: scenes.Scene, language: str, split: str, config: OpenMojiConfig, rng: np.random.Generator) -> str:
    if split != "train" or not scene.name_background:
        return captions.caption(scene, language)
    density = captions.DENSITIES[rng.choice(3, p=np.array(config.densities) / sum(config.densities))]
    if density == "dense" and language == "en" and rng.random() < config.natural:
        return captions.natural(scene)
    return captions.caption(scene, language, density)


def _scenes(
    config: OpenMojiConfig, concepts: Sequence[scenes.Concept], buckets: Sequence[Bucket]
) -> Iterator[tuple[str, scenes.Scene]]:
    for bucket in buckets:
        for concept in concepts:
            for _ in range(config.copies):
                yield "train", scene_sampler.reference_scene(concept, bucket)
    seen = set()
    for split, count in (("train", config.scenes), ("validation", config.validation)):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([config.seed, SPLITS.index(split)])))
        made = rejected = 0
        while made < count:
            scene = scene_sampler.sample_scene(rng, concepts, buckets[made % len(buckets)], config.world)
            words = captions.caption(scene, "en")
            if split == "train" and not (config.hold_out and scene_sampler.held_out(scene)):
                seen.add(words)
            elif split == "train" or words in seen:
                rejected += 1
                if rejected == 1000:  # in a row
                    raise LensError(
                        f"validation {config.validation}: {config.concepts} concepts have too few captions that the "
                        f"{config.scenes} train scenes leave unused; take more concepts or fewer scenes"
                    )
                continue
            made, rejected = made + 1, 0
            yield split, scene


def _check(config: OpenMojiConfig) -> None:
    for language in (*config.languages, *config.holdout_languages):
        if language not in phrases.LANGUAGES:
            known = ", ".join(phrases.LANGUAGES)
            raise LensError(f"language {language!r}: accepted are {known}{nearest(language, phrases.LANGUAGES)}")
    for language in config.holdout_languages:
        if language not in config.languages:
            raise LensError(
                f"--holdout-languages {language!r} is not among the languages {', '.join(config.languages)}"
            )
    if len(set(config.languages)) != len(config.languages):
        raise LensError(f"languages {', '.join(config.languages)}: one is given twice")
    if not set(config.languages) - set(config.holdout_languages):
        raise LensError("holdout_languages: at least one language must be left to train with")
    if min(config.scenes, config.copies, config.validation, config.seed) < 0:
        raise LensError("scenes, copies, validation and seed must not be negative")
    if not config.scenes + config.copies:
        raise LensError("scenes and copies are both 0: there would be nothing to train on")
    if config.size < 8:
        raise LensError(f"size {config.size}: pictograms need at least 8 pixels")
    if min(config.densities) < 0 or not 0 < sum(config.densities) < np.inf:
        raise LensError(f"densities {config.densities}: none may be negative, and one must be above 0")
    if not 0 <= config.natural <= 1:
        raise LensError(f"natural {config.natural}: a share from 0 to 1")
    least = 4 if config.world == "all" else 3
    if config.scenes + config.validation and config.concepts < least:
        raise LensError(f"concepts {config.concepts}: scenes need at least {least}")
    if config.world == "all" and config.scenes + config.validation:
        lettering.letters("A", next(iter(lettering.FONTS)), 8)  # names the package that is missing
