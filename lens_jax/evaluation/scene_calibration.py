"""How often the checker is right where the truth is known: on true renderings, clean and corrupted.

    python -m lens_jax.evaluation.scene_calibration 200

prints the table of docs/scene_bench.md from 200 scenes of every corruption.
"""

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lens_jax.checker.classifier import SceneClassifier, fit_classifier
from lens_jax.checker.look import Seen, look
from lens_jax.checker.references import References, load_references
from lens_jax.console import make_console
from lens_jax.data import scene_sampler, scenes
from lens_jax.data.buckets import Bucket, make_buckets
from lens_jax.data.scenes import Box, Concept, Scene, Sprite
from lens_jax.data.sources import openmoji

# Of centre and side, pixels.
_TOLERANCE = 1.5
_GROUPS = 8

Corruption = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def blurred(radius: float) -> Corruption:
    """Gaussian blur of that standard deviation, pixels."""

    def corrupt(image, rng):
        from PIL import Image, ImageFilter

        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))

    return corrupt


def noisy(deviation: float) -> Corruption:
    """Gaussian noise on every channel, in 255ths."""
    return lambda image, rng: _whole(image + rng.normal(0, deviation, image.shape))


def shifted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moved by up to half a pixel both ways, between pixels linearly."""
    values = np.pad(image.astype(np.float64), ((0, 1), (0, 1), (0, 0)), mode="edge")
    down, across = rng.uniform(0, 0.5, size=2)
    values = (1 - down) * values[:-1] + down * values[1:]
    return _whole((1 - across) * values[:, :-1] + across * values[:, 1:])


def as_jpeg(quality: int) -> Corruption:
    """Through a JPEG file, its colours at half resolution."""

    def corrupt(image, rng):
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=2)
        return np.asarray(Image.open(buffer).convert("RGB"))

    return corrupt


def tinted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each channel lighter or darker by up to 8 %."""
    return _whole(image * rng.uniform(0.92, 1.08, size=3))


def through_codec(scenes_of: Sequence[np.ndarray], components: int = 80) -> Corruption:
    """Encoded and decoded by a linear codec fitted to those images: what a model's samples can be at best."""
    from lens_jax.encoders.linear import LinearCodecConfig

    codec = LinearCodecConfig(patch=8, components=components)
    params = codec.fit(image[None] for image in scenes_of)

    def corrupt(image, rng):
        latents = codec.encode(params, image[None].astype(np.float32) / 127.5 - 1)
        decoded = codec.decode(params, latents, (image.shape[0] // 8, image.shape[1] // 8))
        return _whole((np.asarray(decoded[0], np.float64) + 1) * 127.5)

    return corrupt


def _whole(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


CORRUPTIONS: dict[str, Corruption] = {
    "clean": lambda image, rng: image,
    "blur 0.5": blurred(0.5),
    "blur 0.8": blurred(0.8),
    "blur 1.2": blurred(1.2),
    "noise 8": noisy(8),
    "noise 16": noisy(16),
    "shift": shifted,
    "tint": tinted,
    "jpeg 75": as_jpeg(75),
    "jpeg 40": as_jpeg(40),
}
# background  its name
# what        every concept, none else
# count       how many objects
# where       every centre within 1.5 pixels, where `what` is right
# size        every side within 1.5 pixels, where `what` is right
# word        letter by letter, and none where there is none
# classifier  the second opinion on `what`
PROPERTIES = ("background", "what", "count", "where", "size", "word", "classifier")


@dataclass(frozen=True)
class Row:
    """Right answers and questions by property, for one corruption."""

    right: dict[str, int]
    total: dict[str, int]

    def share(self, name: str) -> float:
        return self.right[name] / self.total[name] if self.total[name] else float("nan")


def calibrate(
    concepts: Sequence[Concept],
    sprite: Sprite,
    buckets: Sequence[Bucket],
    references: References,
    count: int,
    corruptions: dict[str, Corruption] = CORRUPTIONS,
    classifier: SceneClassifier | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Row]:
    """The table of PROPERTIES by corruption, from `count` scenes of all kinds in turn, the same for each."""
    kinds = list(scene_sampler.KINDS["all"])
    rows = {name: Row(dict.fromkeys(PROPERTIES, 0), dict.fromkeys(PROPERTIES, 0)) for name in corruptions}
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0xCA1])))
    for i in range(count):
        bucket = buckets[i // len(kinds) % len(buckets)]
        scene = scene_sampler.sample_scene(rng, concepts, bucket, "all", kinds[i % len(kinds)])
        clean = scenes.draw(scene, sprite)
        for name, corrupt in corruptions.items():
            image = corrupt(clean, rng)
            answers = compared(scene, look(image, references))
            if classifier and scene.objects:
                answers["classifier"] = classifier.agrees(scene, image)
            for property_, right in answers.items():
                rows[name].right[property_] += right
                rows[name].total[property_] += 1
        if progress:
            progress(i + 1, count)
    return rows


def compared(scene: Scene, seen: Seen) -> dict[str, bool]:
    """Whether each of PROPERTIES was seen as it is; `where` and `size` are left out where objects were not."""
    true = sorted((placed.concept.id, placed.box) for placed in scene.objects)
    found = sorted((one.concept, one.box) for one in seen.objects)
    answers = {
        "background": seen.background == scene.background,
        "what": [name for name, _ in true] == [name for name, _ in found],
        "count": len(true) == len(found),
        "word": [word.text for word in seen.words] == ([scene.word.text] if scene.word else []),
    }
    if answers["what"] and true:
        near = [[_off(box, other) for name_, other in found if name_ == name] for name, box in true]
        answers["where"] = all(any(place <= _TOLERANCE for place, _ in those) for those in near)
        # Of the one that is nearest.
        answers["size"] = all(min(those)[1] <= _TOLERANCE for those in near)
    return answers


def _off(box: Box, other: Box) -> tuple[float, int]:
    """By how many pixels two squares differ in centre, the larger of both ways, and side."""
    across, down = (abs(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1))
    return max(across, down), abs(box[2] - box[0] - other[2] + other[0])


def foreign(concepts: Sequence[Concept], sprite: Sprite, references: References, bucket: Bucket) -> tuple[int, int]:
    """How many pictograms, alone on white, are called something by references that do not have them; and of how many.

    The concepts are left out a group at a time, apples and books together.
    """
    twins = [name for name in references.ids if name.endswith(("_apple", "_book"))]
    others = [name for name in references.ids if name not in twins]
    named = 0
    for group in (twins, *(others[i::_GROUPS] for i in range(_GROUPS))):
        rest = References([name for name in references.ids if name not in group], references.masters)
        for concept in concepts:
            if concept.id in group:
                seen = look(scenes.draw(scene_sampler.reference_scene(concept, bucket), sprite), rest)
                named += any(found.concept for found in seen.objects) or bool(seen.words)
    return named, len(concepts)


def main(argv: Sequence[str]) -> None:
    """Print the table."""
    from rich.progress import Progress

    count = int(argv[0]) if argv else 100
    console = make_console()
    concepts = openmoji.load_concepts(len(openmoji.CONCEPTS))
    buckets = make_buckets(64, ("1:1", "3:4", "4:3", "2:3", "3:2"), 8)
    references = load_references()
    sprite = scenes.sprite_cache(references.masters)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("fitting the classifier")
        show = lambda done, total: progress.update(bar, completed=done, total=total)
        classifier = fit_classifier(concepts, sprite, progress=show)
        bar = progress.add_task("checking")
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([1, 0xCA1])))
        samples = [scene_sampler.sample_scene(rng, concepts, buckets[i % len(buckets)], "all") for i in range(300)]
        codec = through_codec([scenes.draw(scene, sprite) for scene in samples])
        corruptions = {**CORRUPTIONS, "codec 80": codec}
        rows = calibrate(concepts, sprite, buckets, references, count, corruptions, classifier, progress=show)
    console.print(f"| | {' | '.join(PROPERTIES)} |")
    console.print("|---" * (1 + len(PROPERTIES)) + "|")
    for name, row in rows.items():
        console.print(f"| {name} | {' | '.join(f'{100 * row.share(p):.1f}' for p in PROPERTIES)} |")
    named, total = foreign(concepts, sprite, references, buckets[0])
    console.print(f"pictograms called something by references without them: {named} of {total}")


if __name__ == "__main__":
    main(sys.argv[1:])
