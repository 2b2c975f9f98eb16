"""A second opinion on which concepts an image shows, by other means than `look.py`.

No segmentation, no comparison of pixels, no places: every pixel that differs from the background takes the name of the
nearest of OpenMoji's colours, and what counts is how often two names lie a few pixels apart, and where edges point.
Such counts of a scene are about the sum of those of its objects, whatever their places, and grow with their areas. So
a linear map, ridge regression on renderings of single pictograms, gives the area that each concept takes. What pleases
the checker by fooling its comparison of pixels has no reason to please this as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lens_jax.data import scene_sampler, scenes
from lens_jax.data.buckets import Bucket
from lens_jax.data.scenes import COLOURS, Concept, Placed, Scene, Sprite

# The colours that OpenMoji's guidelines allow, without skin and hair.
_PALETTE = np.array(
    [
        (0, 0, 0), (63, 63, 63), (155, 155, 154), (208, 207, 206), (255, 255, 255), (30, 80, 160), (97, 178, 228),
        (146, 211, 245), (92, 158, 49), (177, 204, 51), (210, 47, 39), (234, 90, 71), (230, 122, 148),
        (255, 167, 192), (137, 103, 170), (179, 153, 200), (226, 112, 34), (241, 179, 28), (244, 170, 65),
        (252, 234, 43), (165, 121, 57), (106, 70, 47),
    ]
)  # fmt: skip
# Pixels between two names, down and across.
_APART = ((0, 2), (2, 0), (0, 5), (5, 0))
_DIRECTIONS = 8
# A pixel counts by its distance from the background, fully from this one on.
_FULL = 80.0
# Ridge of the regression, for features scaled to unit variance, a part of their number.
_RIDGE = 0.01
# Sides of the pictograms it is fitted on, give or take a pixel: those of scenes, the small one twice. And how they are
# disturbed, so that the weights do not rest on what blur or noise takes away.
_SIDES, _BLURS, _NOISE = (22, 22, 46), (0.0, 0.4, 0.8), 8.0


@dataclass(frozen=True)
class SceneClassifier:
    """Fitted weights."""

    # Concepts by column of the weights.
    ids: tuple[str, ...]
    # float64 [F], [F, C] and [C]: features are scaled, then mapped to areas in hundreds of pixels.
    scale: np.ndarray
    weights: np.ndarray

    def areas(self, image: np.ndarray) -> np.ndarray:
        """The area that each concept seems to take in a uint8 [H, W, 3] image, in hundreds of pixels: float64 [C]."""
        return (features(image) / self.scale) @ self.weights

    def agrees(self, scene: Scene, image: np.ndarray) -> bool:
        """Whether the concepts of the scene, k different ones, are the k that seem to take the most of the image."""
        asked = {placed.concept.id for placed in scene.objects}
        largest = np.argsort(-self.areas(image), kind="stable")[: len(asked)]
        return {self.ids[i] for i in largest} == asked


def fit_classifier(
    concepts: Sequence[Concept],
    sprite: Sprite,
    copies: int = 12,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SceneClassifier:
    """Ridge regression from `features` to the areas of concepts, on `copies` pictures of each and as many words as
    concepts, which have no area.

    Same arguments, same weights up to rounding. `progress` is called with (pictures done, pictures in all).
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0x5CE])))
    count = len(concepts) * (copies + 1)
    values, areas = [], np.zeros((count, len(concepts)))
    for i in range(count):
        copy, column = divmod(i, len(concepts))
        side = _SIDES[copy % len(_SIDES)] + int(rng.integers(-1, 2))
        background = list(COLOURS)[(copy + column) % len(COLOURS)]
        if copy < copies:
            areas[i, column] = side**2 / 100
            placed = Placed(concepts[column], "", (3, 3, side + 3, side + 3))
            scene = Scene(Bucket(side + 6, side + 6), background, (placed,))
        else:
            scene = scene_sampler.sample_scene(rng, concepts, Bucket(64, 64), "all", "word")
        values.append(features(_disturbed(scenes.draw(scene, sprite), rng)))
        if progress and (i + 1) % 64 == 0:
            progress(i + 1, count)
    values = np.stack(values)
    # Without an intercept: an image of nothing has no area.
    scale = np.sqrt(np.square(values).mean(0)) + 0.05
    values = values / scale
    # The dual form: about as many unknowns as images.
    gram = values @ values.T + _RIDGE * values.shape[1] * np.eye(count)
    return SceneClassifier(tuple(c.id for c in concepts), scale, values.T @ np.linalg.solve(gram, areas))


def features(image: np.ndarray) -> np.ndarray:
    """Counts, in hundreds of pixels, of names, of pairs of them, and of edges by direction and name: float64 [F]."""
    values = image.astype(np.float64)
    border = np.concatenate([values[0], values[-1], values[1:-1, 0], values[1:-1, -1]])
    weight = np.sqrt(np.square(values - np.median(border, 0)).sum(-1))
    weight = np.where(weight < _FULL / 4, 0, np.minimum(weight / _FULL, 1))
    flat = values.reshape(-1, 3)
    # The nearest colour; the square of the pixel itself is the same for all.
    names = (np.square(_PALETTE).sum(1) - 2 * flat @ _PALETTE.T).argmin(1).reshape(weight.shape)
    kinds = len(_PALETTE)
    counts = [np.bincount(names.ravel(), weight.ravel(), kinds)]
    height, width = weight.shape
    for down, across in _APART:
        first = slice(0, height - down), slice(0, width - across)
        second = slice(down, height), slice(across, width)
        pair = names[first] * kinds + names[second]
        counts.append(np.bincount(pair.ravel(), (weight[first] * weight[second]).ravel(), kinds**2))
    slope_down, slope_across = np.gradient(values.mean(-1))
    turn = np.arctan2(slope_down, slope_across) / (2 * np.pi) * _DIRECTIONS
    edges = (np.floor(turn + 0.5).astype(np.int64) % _DIRECTIONS) * kinds + names
    strength = np.hypot(slope_down, slope_across) * weight / 64
    counts.append(np.bincount(edges.ravel(), strength.ravel(), kinds * _DIRECTIONS))
    return np.concatenate(counts) / 100


def _disturbed(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image, ImageFilter

    radius = _BLURS[rng.integers(len(_BLURS))]
    if radius:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
    noise = rng.normal(0, _NOISE * rng.random(), image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)
