"""The concept benchmark's references: of every size, and each nearest to itself."""

import numpy as np

from lens_jax.data.buckets import Bucket
from lens_jax.evaluation.concepts import nearest_reference, reference_images


def test_references_are_nearest_to_themselves(concepts):
    buckets = (Bucket(24, 24), Bucket(24, 32))
    found = reference_images(concepts[:6], buckets)
    assert {bucket: images.shape for bucket, images in found.items()} == {b: (6, b.height, b.width, 3) for b in buckets}
    for images in found.values():
        noisy = np.clip(images + np.random.default_rng(0).normal(0, 20, images.shape), 0, 255).astype(np.uint8)
        np.testing.assert_array_equal(nearest_reference(noisy, images), np.arange(6))
