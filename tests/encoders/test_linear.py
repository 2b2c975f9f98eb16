"""The linear codec: round trips, its components, the same fit on every machine, and its errors."""

import numpy as np
import pytest

from lens_jax.encoders.images import from_uint8, to_uint8
from lens_jax.encoders.linear import LinearCodecConfig
from lens_jax.errors import LensError
from lens_jax.models.latent_grid import latent_grid

CONFIG = LinearCodecConfig(patch=4, components=48)


def test_round_trip_to_the_byte():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3)).astype(np.uint8)
    params = CONFIG.fit([images])
    latents = CONFIG.encode(params, from_uint8(images))
    assert latents.shape == (5, 6, 48)
    decoded = np.asarray(to_uint8(CONFIG.decode(params, latents, (2, 3)))).astype(int)
    # Truncation instead of rounding may take one level.
    assert np.abs(decoded - images).max() <= 1


def smooth_images(rng: np.random.Generator, count: int) -> np.ndarray:
    """Blocks of colour with a little grain: squares that have far fewer dimensions than numbers, nearly."""
    coarse = rng.uniform(30, 220, (count, 5, 5, 3)).repeat(4, axis=1).repeat(4, axis=2)
    return (coarse + rng.normal(0, 10, coarse.shape)).astype(np.uint8)[:, 2:18, 2:18]


def test_components_are_principal_and_share_a_scale():
    batches = [smooth_images(np.random.default_rng(seed), 50) for seed in range(4)]
    codec = LinearCodecConfig(patch=4, components=12)
    params = codec.fit(batches)
    np.testing.assert_allclose(params["basis"].T @ params["basis"], np.eye(12), atol=1e-6)
    latents = np.concatenate([codec.encode(params, from_uint8(batch)) for batch in batches]).reshape(-1, 12)
    np.testing.assert_allclose(latents.mean(0), 0, atol=1e-4)
    variances = latents.var(0)
    np.testing.assert_allclose(variances.mean(), 1, rtol=1e-3)
    assert (np.diff(variances) <= 1e-5).all()
    np.testing.assert_allclose(np.cov(latents.T) - np.diag(variances), 0, atol=1e-2)
    # What twelve components keep is what the best twelve can: the rest of the covariance's trace is the error.
    images = np.concatenate(batches)
    decoded = codec.decode(params, codec.encode(params, from_uint8(images)), (4, 4))
    pixels = np.asarray(CONFIG._pack(from_uint8(images))).reshape(-1, 48)
    lost = np.sort(np.linalg.eigvalsh(np.cov(pixels.T, bias=True)))[:-12].sum() / 48
    np.testing.assert_allclose(np.square(decoded - from_uint8(images)).mean(), lost, rtol=1e-3)


def test_a_fit_streams_and_its_signs_are_fixed():
    images = smooth_images(np.random.default_rng(0), 64)
    whole, parts = CONFIG.fit([images]), CONFIG.fit(images[i : i + 16] for i in range(0, 64, 16))
    shown = [CONFIG.decode(p, CONFIG.encode(p, from_uint8(images)), (4, 4)) for p in (whole, parts)]
    np.testing.assert_allclose(*shown, atol=1e-4)
    largest = np.take_along_axis(whole["basis"], np.abs(whole["basis"]).argmax(0)[None], axis=0)
    assert (largest > 0).all()
    for name, leaf in CONFIG.abstract_fitted().items():
        assert (whole[name].shape, whole[name].dtype) == (leaf.shape, leaf.dtype)
    with pytest.raises(LensError, match="at least one batch"):
        CONFIG.fit([])
    with pytest.raises(LensError, match=r"codec\.components is 49; it must be from 1 to 3 patch² = 48"):
        LinearCodecConfig(patch=4, components=49)


def test_uint8_is_truncated_and_clipped():
    values = np.array([-2, -1, 0, 0.999, 1, 2], np.float32)
    assert to_uint8(values.reshape(2, 3)).ravel().tolist() == [0, 0, 127, 254, 255, 255]
    assert to_uint8(np.float32([[np.nan, 0, 0], [0, 0, np.inf]])).tolist() == [[255, 0, 255]] * 2  # and not black


@pytest.mark.parametrize("size", [(8, 10), (0, 8), (-4, 8)])
def test_sizes_that_cannot_be_tiled(size):
    with pytest.raises(LensError, match=f"size {size[0]}x{size[1]} cannot be tiled: .* multiples of 4"):
        latent_grid(CONFIG, *size)
