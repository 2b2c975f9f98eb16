"""The time embedding."""

import jax
import numpy as np

from lens_jax.models import layers


def test_the_factor_of_the_timestep_comes_last():
    """1000 (t f) in float32 as in the release, compiled: XLA must not put the factor into the constant beside it."""
    t = np.random.default_rng(0).random(500, np.float32)
    exponents = np.float32(-np.log(10_000.0)) * np.arange(128, dtype=np.float32) / np.float32(128)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (np.float32(1000) * (t[:, None] * frequencies)).astype(np.float64)
    features = jax.jit(layers.timestep_features)(t)
    # The error of a cosine; the other order is 6e-5 off.
    np.testing.assert_allclose(features, np.concatenate([np.cos(angles), np.sin(angles)], 1), rtol=0, atol=1e-6)
