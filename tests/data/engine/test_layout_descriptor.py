"""The descriptor without a network: copies are close, other images are not, and what has no direction has none."""

import numpy as np
import pytest
from PIL import Image

from lens_jax.bench import copies
from lens_jax.data.engine.scorers import layout


def picture(seed, size=(160, 120)):
    """A smooth random image with a few hard edges: a spectrum as photographs have it."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (4, 5, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.array(small)
    for _ in range(6):
        x, y = draw.integers(0, size[0] - 30), draw.integers(0, size[1] - 30)
        pixels[y : y + draw.integers(8, 30), x : x + draw.integers(8, 30)] = draw.integers(0, 256, 3)
    return Image.fromarray(pixels)


def embed(*images):
    scorer = layout.load()
    return scorer.score(np.stack([scorer.prepare(np.asarray(image)) for image in images]))["embedding"]


def test_copies_are_closer_than_other_images():
    images = [picture(seed) for seed in range(40)]
    originals = embed(*images)
    others = (originals @ originals.T)[np.triu_indices(40, 1)]
    for kind, make in copies.KINDS.items():
        cosine = (originals * embed(*map(make, images))).sum(1)
        assert np.median(cosine) > others.max(), kind


def test_brightness_and_contrast_do_not_count():
    pixels = np.asarray(picture(1)).astype(np.float64)
    grey = np.repeat(pixels.mean(2, keepdims=True), 3, 2)
    darker = 0.5 * grey + 20
    a, b = embed(*(Image.fromarray(x.round().astype(np.uint8)) for x in (grey, darker)))
    assert a @ b > 0.999


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_flat_image_has_no_direction(value):
    flat = np.full((50, 70, 3), value, np.uint8)
    noisy = flat.copy()
    noisy[::7, ::5] = abs(value - 1)
    assert not embed(Image.fromarray(flat)).any()
    assert not embed(Image.fromarray(noisy)).any()


def test_width_and_length():
    vectors = embed(picture(0), picture(1))
    assert vectors.shape == (2, layout.load().width)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert embed(Image.fromarray(np.zeros((1, 1, 3), np.uint8))).shape == (1, layout.load().width)


def test_recall_and_precision_are_counted():
    """Two images with a copy each, one of which is nearer to the other image."""
    originals = np.eye(2, 4, dtype=np.float32)
    far = np.array([[0.995, 0, 0.0999, 0], [0.96, 0.28, 0, 0]], np.float32)
    found = copies.figures(originals, {"a": far}, 0.9)
    assert found["at 0.95"] == "a 0.500; precision 0.5000; 0 pairs of originals (0.0e+00)"
    assert found["at 0.97"] == "a 0.500; precision 1.0000; 0 pairs of originals (0.0e+00)"
    # Pairs are those above a threshold: at 0.96 the wrong one is none.
    assert found["least threshold of that precision"] == 0.96
