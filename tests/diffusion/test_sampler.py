"""The released schedule, its guidance, and the Euler loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.diffusion import sampler
from lens_jax.errors import LensError

# Noise levels of the release, to seven digits.
SIGMAS = {
    (4096, 4): [1, 0.967384, 0.9081439, 0.7671999],
    (8100, 4): [1, 0.9491345, 0.8614939, 0.6746168],
    (1024, 4): [1, 0.9580854, 0.8839819, 0.7174966],
    (4096, 20): [
        1, 0.9941907, 0.9878144, 0.9807842, 0.9729939, 0.9643132, 0.95458, 0.9435908, 0.9310856, 0.9167275, 0.9000717,
        0.8805187, 0.8572405, 0.8290604, 0.794248, 0.7501495, 0.6924775, 0.6138254, 0.5001994, 0.3216026,
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", SIGMAS, ids=str)
def test_schedule(case):
    sigmas = sampler.sigma_schedule(*case)
    assert sigmas.dtype == np.float32
    assert sigmas[-1] == 0
    np.testing.assert_allclose(sigmas[:-1], SIGMAS[case], atol=2e-7)


def test_mu():
    for (tokens, steps), mu in {
        (4096, 4): 2.291180,
        (4096, 20): 2.198022,
        (4096, 50): 2.023351,
        (8100, 7): 1.827754,
    }.items():
        assert sampler.schedule_mu(tokens, steps) == pytest.approx(mu, abs=1e-6)
    with pytest.raises(LensError, match="num_inference_steps is 0"):
        sampler.sigma_schedule(4096, 0)


def test_guidance_keeps_the_conditional_norm():
    c, u = jax.random.normal(jax.random.key(0), (2, 3, 5, 8))
    guided = sampler.guide(c, u, 5.0)
    np.testing.assert_allclose(jnp.linalg.norm(guided, axis=-1), jnp.linalg.norm(c, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(sampler.guide(c, u, 1.0), c, rtol=1e-5, atol=1e-6)
    # Where everything is zero nothing is divided by zero.
    assert jnp.isfinite(sampler.guide(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 3)), 5.0)).all()


def test_euler_is_exact_on_straight_paths():
    """With the true velocity noise - clean of one clean image, any number of steps ends on it."""
    clean, noise = jax.random.normal(jax.random.key(0), (2, 2, 4, 3))
    final, trajectory = sampler.euler(lambda x, t: noise - clean, noise, sampler.sigma_schedule(1024, 4))
    np.testing.assert_allclose(final, clean, atol=1e-5)
    assert trajectory.shape == (4, *noise.shape)
    np.testing.assert_array_equal(trajectory[-1], final)
