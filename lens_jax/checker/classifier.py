"""A second opinion on which concepts an image shows, by other means than `look.py`.

No segmentation, no references, no places: counts of colours, of pairs of colours three pixels apart, and of edges by
direction and colour, summed over the whole image. Such counts of a scene are about the sum of those of its parts, each
times its area; so one linear map, ridge regression on renderings, gives the area that each concept takes. What pleases
the checker by fooling its comparison of pixels has no reason to please this as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lens_jax.data import scene_sampler, scenes
from lens_jax.data.buckets import Bucket
from lens_jax.data.scenes import Concept, Scene, Sprite

# Levels of a channel for colours by themselves, and for those of a pair.
_LEVELS, _PAIR_LEVELS = 6, 3
_DIRECTIONS = 8
# Pixels between the two of a pair.
_APART = 3
# Ridge of the regression, for features scaled to unit variance, a part of the number of images.
_RIDGE = 0.02
# How a fitted image is disturbed, so that the weights do not rest on what blur or noise takes away.
_BLURS, _NOISE = (0.0, 0.5, 0.9), 10.0
# Kinds of scenes it is fitted on: one pictogram alone teaches most.
_KINDS = ("one", "one", "two", "relation", "same three", "four", "word and one", "three")


@dataclass(frozen=True)
class SceneClassifier:
    """Fitted weights."""

    # Concepts by column of the weights.
    ids: tuple[str, ...]
    # float64 [F], [F] and [F, C]: features are centred and scaled, then mapped to areas in hundredths of the image.
    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    # float64 [C].
    bias: np.ndarray

    def areas(self, image: np.ndarray) -> np.ndarray:
        """The area that each concept seems to take in a uint8 [H, W, 3] image, in hundredths of it: float64 [C]."""
        return ((features(image) - self.mean) / self.scale) @ self.weights + self.bias

    def agrees(self, scene: Scene, image: np.ndarray) -> bool:
        """Whether the concepts of the scene, k different ones, are the k that take the most of the image."""
        asked = {placed.concept.id for placed in scene.objects}
        largest = np.argsort(-self.areas(image), kind="stable")[: len(asked)]
        return {self.ids[i] for i in largest} == asked


def fit_classifier(
    concepts: Sequence[Concept],
    sprite: Sprite,
    buckets: Sequence[Bucket],
    count: int = 3000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SceneClassifier:
    """Ridge regression from `features` of `count` random scenes to the areas of their concepts.

    Same arguments, same weights up to rounding. `progress` is called with (scenes done, scenes in all).
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0x5CE])))
    columns = {concept.id: i for i, concept in enumerate(concepts)}
    rows, areas = [], np.zeros((count, len(concepts)))
    for i in range(count):
        bucket = buckets[i % len(buckets)]
        scene = scene_sampler.sample_scene(rng, concepts, bucket, "all", _KINDS[i // len(buckets) % len(_KINDS)])
        for placed in scene.objects:
            side = placed.box[2] - placed.box[0]
            areas[i, columns[placed.concept.id]] += 100 * side**2 / (bucket.height * bucket.width)
        rows.append(features(_disturbed(scenes.draw(scene, sprite), rng)))
        if progress and (i + 1) % 50 == 0:
            progress(i + 1, count)
    values = np.stack(rows)
    mean, scale = values.mean(0), values.std(0) + 1e-4
    values = (values - mean) / scale
    bias = areas.mean(0)
    # The dual form: as many unknowns as images, fewer than twice the features.
    gram = values @ values.T + _RIDGE * values.shape[1] * np.eye(count)
    weights = values.T @ np.linalg.solve(gram, areas - bias)
    return SceneClassifier(tuple(columns), mean, scale, weights, bias)


def features(image: np.ndarray) -> np.ndarray:
    """Shares of the image by colour, by pair of colours, and by direction and colour of its edges: float64 [F]."""
    values = image.astype(np.float64) / 255
    pixels = values.shape[0] * values.shape[1]
    shares = [_soft_counts(values.reshape(-1, 3), _LEVELS)]
    bins = np.minimum((values * _PAIR_LEVELS).astype(np.int64), _PAIR_LEVELS - 1)
    colours = (bins[..., 0] * _PAIR_LEVELS + bins[..., 1]) * _PAIR_LEVELS + bins[..., 2]
    kinds = _PAIR_LEVELS**3
    for first, second in (
        (colours[:, :-_APART], colours[:, _APART:]),
        (colours[:-_APART], colours[_APART:]),
    ):
        shares.append(np.bincount((first * kinds + second).ravel(), minlength=kinds**2))
    grey = values.mean(-1)
    down, across = np.gradient(grey)
    strength = np.hypot(down, across)
    turn = np.floor((np.arctan2(down, across) / (2 * np.pi) + 1 + 0.5 / _DIRECTIONS) * _DIRECTIONS).astype(np.int64)
    edges = (turn % _DIRECTIONS) * kinds + colours
    shares.append(np.bincount(edges.ravel(), weights=strength.ravel(), minlength=_DIRECTIONS * kinds))

    return np.concatenate(shares) * (100 / pixels)


def _soft_counts(pixels: np.ndarray, levels: int) -> np.ndarray:
    """Counts of colours [P, 3] on a grid of levels^3, each pixel shared among the eight around it."""
    place = pixels * (levels - 1)
    low = np.minimum(place.astype(np.int64), levels - 2)
    part = place - low
    counts = np.zeros(levels**3)
    for corner in range(8):
        steps = np.array([corner >> 2 & 1, corner >> 1 & 1, corner & 1])
        weight = np.where(steps, part, 1 - part).prod(-1)
        at = low + steps
        index = (at[:, 0] * levels + at[:, 1]) * levels + at[:, 2]
        counts += np.bincount(index, weights=weight, minlength=levels**3)
    return counts


def _disturbed(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image, ImageFilter

    radius = _BLURS[rng.integers(len(_BLURS))]
    if radius:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
    noise = rng.normal(0, _NOISE * rng.random(), image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)
