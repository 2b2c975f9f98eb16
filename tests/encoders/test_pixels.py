"""The parameter-free codec: a round trip, its statistics, its channel order and its errors."""

import numpy as np
import pytest

from lens_jax.encoders.images import from_uint8, to_uint8
from lens_jax.encoders.pixels import PixelCodecConfig
from lens_jax.errors import LensError
from lens_jax.models.latent_grid import latent_grid

CONFIG = PixelCodecConfig(patch=4)


def test_round_trip_to_the_byte():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3)).astype(np.uint8)
    params = CONFIG.fit([images])
    latents = CONFIG.encode(params, from_uint8(images))
    assert latents.shape == (5, 6, 48)
    decoded = np.asarray(to_uint8(CONFIG.decode(params, latents, (2, 3)))).astype(int)
    # Truncation instead of rounding may take one level.
    assert np.abs(decoded - images).max() <= 1


def test_fitted_latents_have_unit_statistics():
    rng = np.random.default_rng(0)
    batches = [rng.normal(100, 30, (8, 16, 16, 3)).clip(0, 255).astype(np.uint8) for _ in range(4)]
    params = CONFIG.fit(batches)
    latents = np.concatenate([CONFIG.encode(params, from_uint8(b)) for b in batches]).reshape(-1, 48)
    np.testing.assert_allclose(latents.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(latents.std(0), 1, atol=2e-3)


def test_channel_order_is_that_of_the_release():
    """idx = c p² + p1 p + p2, as the release packs its latents."""
    images = np.zeros((1, 4, 4, 3), np.float32)
    images[0, 1, 2, 1] = 1
    nothing = {"mean": np.zeros(48, np.float32), "std": np.ones(48, np.float32)}
    assert np.flatnonzero(CONFIG.encode(nothing, images)).tolist() == [1 * 16 + 1 * 4 + 2]


def test_uint8_is_truncated_and_clipped():
    values = np.array([-2, -1, 0, 0.999, 1, 2], np.float32)
    assert to_uint8(values.reshape(2, 3)).ravel().tolist() == [0, 0, 127, 254, 255, 255]
    assert to_uint8(np.float32([[np.nan, 0, 0], [0, 0, np.inf]])).tolist() == [[255, 0, 255]] * 2  # and not black


@pytest.mark.parametrize("size", [(8, 10), (0, 8), (-4, 8)])
def test_sizes_that_cannot_be_tiled(size):
    with pytest.raises(LensError, match=f"size {size[0]}x{size[1]} cannot be tiled: .* multiples of 4"):
        latent_grid(CONFIG, *size)
