"""The released schedule, its guidance, and the Euler loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.diffusion import sampler
from lens_jax.errors import LensError

# Noise levels of the release: what diffusers' scheduler gives for its config, its float32 bit for bit.
SIGMAS = {
    (4096, 4): [1, 0.96738404, 0.90814394, 0.76719993],
    (8100, 4): [1, 0.94913447, 0.8614939, 0.6746168],
    (1024, 4): [1, 0.95808536, 0.8839819, 0.7174966],
    (4096, 20): [
        1, 0.9941907, 0.9878144, 0.98078424, 0.9729939, 0.9643132, 0.95458, 0.9435908, 0.93108565, 0.91672754,
        0.90007174, 0.8805187, 0.8572405, 0.82906044, 0.79424804, 0.7501495, 0.6924775, 0.6138254, 0.5001994,
        0.32160255,
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", SIGMAS, ids=str)
def test_schedule(case):
    sigmas = sampler.sigma_schedule(*case)
    assert sigmas.dtype == np.float32
    np.testing.assert_array_equal(sigmas, np.float32([*SIGMAS[case], 0]))


def test_the_network_is_asked_about_the_timestep_divided_by_1000():
    """In float32, as the pipeline of the release has it; compiled, where XLA must not cancel the two."""
    sigmas = np.random.default_rng(0).random(1000, np.float32)
    levels = jax.jit(
        lambda s: jax.lax.scan(lambda _, s: (None, sampler.level_of_rows(jnp.zeros((1, 1, 1)), s)[0]), None, s)
    )
    expected = sigmas * np.float32(1000) / np.float32(1000)
    assert (expected != sigmas).any()
    np.testing.assert_array_equal(levels(sigmas)[1], expected)


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


def gaussian(x, t):
    """The exact velocity E[noise - clean | x] where clean is N(0.7, 0.5²) and noise N(0, 1)."""
    mean, deviation = 0.7, 0.5
    t = t[:, None, None]
    between = x - (1 - t) * mean
    return (t - (1 - t) * deviation**2) / (t**2 + (1 - t) ** 2 * deviation**2) * between - mean


def test_dpm2_is_of_second_order():
    """Of a Gaussian the path is known: noise z ends on 0.7 + 0.5 z. The errors on a linear grid, to two digits."""
    with jax.enable_x64(True):
        z = jnp.full((1, 1, 1), 1.3, jnp.float64)
        errors = {}
        for name, solver in sampler.SOLVERS.items():
            for steps in (40, 80, 160):
                final, trajectory = solver(gaussian, z, jnp.linspace(1.0, 0.0, steps + 1, dtype=jnp.float64))
                assert jnp.isfinite(trajectory).all()
                errors[name, steps] = float(final[0, 0, 0] - (0.7 + 0.5 * 1.3))
    np.testing.assert_allclose([errors["euler", n] for n in (40, 80, 160)], [-2.4e-2, -1.2e-2, -6.0e-3], rtol=0.05)
    np.testing.assert_allclose([errors["dpm2", n] for n in (40, 80, 160)], [3.2e-3, 1.0e-3, 3.1e-4], rtol=0.05)


def test_dpm2_by_its_formula():
    """Step by step in terms of lambda, infinities and all."""
    sigmas = sampler.sigma_schedule(1024, 7).astype(np.float64)
    x = np.random.default_rng(0).standard_normal((1, 2, 3))
    velocity = lambda x, t: np.tanh(x) * (1 + t) - 0.3
    with jax.enable_x64(True):
        jax_velocity = lambda x, t: jnp.tanh(x) * (1 + t[:, None, None]) - 0.3
        final, trajectory = sampler.dpm2(jax_velocity, jnp.asarray(x), jnp.asarray(sigmas))
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratio = np.log((1 - sigmas) / sigmas)
    before = None
    for i in range(7):
        sigma, following = sigmas[i : i + 2]
        clean = x - sigma * velocity(x, np.float64(np.float32(sigma)))
        h, change = log_ratio[i + 1] - log_ratio[i], 0
        if 0 < i < 6:
            ratio = (log_ratio[i] - log_ratio[i - 1]) / h
            change = (clean - before) / ratio
        x = following / sigma * x - (1 - following) * (np.exp(-h) - 1) * (clean + change / 2)
        before = clean
        np.testing.assert_allclose(trajectory[i], x, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(final, trajectory[-1])


def test_solvers_agree_on_one_and_two_steps():
    """First and last step are of first order, so that two steps are Euler's, and pure noise gives no infinity."""
    noise = jax.random.normal(jax.random.key(0), (1, 3, 3))
    for steps in (1, 2):
        sigmas = sampler.sigma_schedule(1024, steps)
        results = [solver(gaussian, noise, sigmas)[0] for solver in sampler.SOLVERS.values()]
        np.testing.assert_allclose(*results, atol=1e-6)
