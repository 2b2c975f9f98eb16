"""Flow-GRPO: its loss by hand, and its ratio."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.diffusion import sde
from lens_jax.errors import LensError
from lens_jax.posttraining.grpo import GrpoConfig, kl_to, policy_loss, trained_steps

STEP = sde.Step(jnp.float32(0.6), jnp.float32(0.4), jnp.float32(0.5))


def means(seed: int = 0):
    """after, trained, old [3, 5, 4]: the trained policy a little away from the old one."""
    rng = np.random.default_rng(seed)
    old = rng.standard_normal((3, 5, 4))
    after = old + 0.5 * np.sqrt(0.2) * rng.standard_normal(old.shape)
    return after, old + 0.01 * rng.standard_normal(old.shape), old


def test_ratio_is_that_of_two_gaussians():
    after, trained, old = means()
    deviation = 0.5 * np.sqrt(0.2)
    log_p = lambda mean: -(((after - mean) / deviation) ** 2 / 2 + np.log(deviation) + np.log(2 * np.pi) / 2)
    expected = np.exp((log_p(trained) - log_p(old)).mean((1, 2)))
    _, ratio = policy_loss(GrpoConfig(), STEP, jnp.float32(after), jnp.float32(trained), jnp.float32(old), jnp.ones(3))
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)
    _, same = policy_loss(GrpoConfig(), STEP, jnp.float32(after), jnp.float32(old), jnp.float32(old), jnp.ones(3))
    assert (same == 1).all()


def test_loss_by_hand():
    """Ratios 1 + d with d beyond the clip: worse actions count in full, better ones up to the clip."""
    config = GrpoConfig(clip=1e-4)
    after, trained, old = (jnp.float32(x) for x in means())
    a = jnp.array([2.0, -7.0, 0.0])
    found, ratio = policy_loss(config, STEP, after, trained, old, a)
    a = np.clip(a, -5, 5)
    expected = np.maximum(-a * ratio, -a * np.clip(ratio, 1 - 1e-4, 1 + 1e-4))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.abs(np.asarray(ratio) - 1).min() > 1e-4
    gradient = jax.grad(lambda x: policy_loss(config, STEP, after, x, old, jnp.sign(ratio - 1))[0].sum())(trained)
    # Every ratio is already on the side its advantage wants, and beyond the clip.
    assert (gradient == 0).all()


def test_gradient_at_the_old_policy_raises_what_was_good():
    after, _, old = (jnp.float32(x) for x in means())
    gradient = jax.grad(lambda x: policy_loss(GrpoConfig(), STEP, after, x, old, jnp.ones(3))[0].sum())(old)
    # d(-rho) = -(after - mean) / (N C variance).
    np.testing.assert_allclose(gradient, -(after - old) / (20 * 0.25 * 0.2), rtol=1e-4, atol=1e-6)


def test_kl():
    _, trained, old = means()
    expected = np.square(trained - old).mean((1, 2)) / (2 * 0.25)
    np.testing.assert_allclose(kl_to(STEP, jnp.float32(trained), jnp.float32(old)), expected, rtol=1e-5)


def test_steps_that_are_trained_on():
    assert trained_steps(GrpoConfig(), 10) == 9
    assert trained_steps(GrpoConfig(noisy_steps=3), 10) == 3
    assert trained_steps(GrpoConfig(noisy_steps=30), 10) == 9
    with pytest.raises(LensError, match=r"grpo\.noise"):
        GrpoConfig(noise=0)
