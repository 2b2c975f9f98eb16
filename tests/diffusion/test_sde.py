"""The SDE sampler: without noise it is Euler's, with noise it keeps the distribution, and its noise is as stated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.diffusion import sampler, sde


def gaussian(x, t):
    """The exact velocity E[noise - clean | x] where clean is N(0.7, 0.5²) and noise N(0, 1)."""
    mean, deviation = 0.7, 0.5
    t = t[:, None, None]
    between = x - (1 - t) * mean
    return (t - (1 - t) * deviation**2) / (t**2 + (1 - t) ** 2 * deviation**2) * between - mean


def test_without_noise_it_is_euler_bit_for_bit():
    noise = jax.random.normal(jax.random.key(0), (2, 3, 4))
    sigmas = jnp.asarray(sampler.sigma_schedule(1024, 7))
    draw = lambda i: jax.random.normal(jax.random.key(i), noise.shape)
    # Operation by operation: whether a product and the sum after it are rounded once or twice, the compiler chooses.
    with jax.disable_jit():
        final, trajectory = sampler.euler(gaussian, noise, sigmas)
        path = sde.sample(gaussian, noise, sigmas, jnp.zeros(7), draw)
    np.testing.assert_array_equal(path[0], noise)
    np.testing.assert_array_equal(path[1:], trajectory)
    np.testing.assert_array_equal(path[-1], final)


def test_a_step_by_its_formula():
    """In float64; at sigma = 1 the second noise level stands in for it, and nothing is infinite."""
    sigmas = np.array([1, 0.8, 0.5, 0])
    steps = sde.steps_of(jnp.asarray(sigmas), jnp.full(3, 0.7))
    expected = 0.7 * np.sqrt([1 / (1 - 0.8), 0.8 / 0.2, 0.5 / 0.5])
    np.testing.assert_allclose(steps.noise, expected, rtol=1e-6)
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((2, 1, 3, 4))
    s, dt = expected[1], 0.5 - 0.8
    mean = x * (1 + s**2 / 1.6 * dt) + v * (1 + s**2 * 0.2 / 1.6) * dt
    second = jax.tree.map(lambda part: part[1], steps)
    np.testing.assert_allclose(sde.mean_after(second, jnp.asarray(x), jnp.asarray(v)), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second.deviation, s * np.sqrt(0.3), rtol=1e-6)


@pytest.mark.slow
def test_the_distribution_is_kept():
    """A Gaussian of deviation 0.5, 200,000 samples: with 400 steps within 0.5 % of it, as Euler's ODE is."""
    count = 200_000
    noise = jax.random.normal(jax.random.key(0), (count, 1, 1))
    key = jax.random.key(1)
    draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), noise.shape)
    sigmas = jnp.linspace(1.0, 0.0, 401)
    levels = jnp.where(jnp.arange(400) < 399, 0.7, 0.0)
    final = jax.jit(lambda x: sde.sample(gaussian, x, sigmas, levels, draw)[-1])(noise)
    # The standard error of a deviation of 0.5 from so many samples is 0.0008.
    np.testing.assert_allclose([final.mean(), final.std()], [0.7, 0.5], atol=0.005)
    # It went another way than the ODE: what it ends on does not follow from where it began.
    assert abs(np.corrcoef(noise[:, 0, 0], final[:, 0, 0])[0, 1]) < 0.9
