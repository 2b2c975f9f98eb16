"""DiffusionNFT in closed form: both forms of its loss, its optimum, what holds before the first step, its schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.posttraining.nft import NftConfig, old_decay, policy_loss


def samples(seed: int = 0, count: int = 3):
    """trained, old, x0, noise [B, N, C], t and r [B]."""
    rng = np.random.default_rng(seed)
    velocities = (rng.standard_normal((count, 5, 4)) for _ in range(4))
    return *velocities, rng.uniform(0.05, 1, count), rng.uniform(0, 1, count)


def loss_of_x0(config, trained, old, clean, noise, t, r):
    """As it is written in the reference code: x0 predicted by both implicit policies, and their weights."""
    level = t[:, None, None]
    x = (1 - level) * clean + level * noise
    losses = []
    for v in (
        config.beta * trained + (1 - config.beta) * old,
        (1 + config.beta) * old - config.beta * trained,
    ):
        error = x - level * v - clean
        weight = np.maximum(np.abs(error).mean((1, 2)), 1e-5)
        losses.append(np.square(error).mean((1, 2)) / weight)
    return config.z_c / config.beta * (r * losses[0] + (1 - r) * losses[1])


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_velocities_give_the_loss_of_x0(beta):
    config = NftConfig(beta=beta, z_c=5)
    trained, old, clean, noise, t, r = samples()
    expected = loss_of_x0(config, trained, old, clean, noise, t, r)
    found = policy_loss(config, trained, old, noise - clean, jnp.float32(t), jnp.float32(r))
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    # Padding counts for nothing.
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 3), (0, 0)), constant_values=7)
    padded = policy_loss(config, pad(trained), pad(old), pad(noise - clean), jnp.float32(t), jnp.float32(r), 5)
    np.testing.assert_allclose(padded, expected, rtol=2e-6)


def test_an_exact_prediction_is_no_division_by_zero():
    """Errors of less than 1e-5 in x0 are weighted by that, as in the reference."""
    config = NftConfig()
    target = jnp.ones((2, 3, 4))
    t, r = jnp.array([1e-3, 1.0]), jnp.array([0.3, 0.8])
    value, gradient = jax.value_and_grad(lambda v: policy_loss(config, v, target, target, t, r).sum())(target)
    assert value == 0
    assert (gradient == 0).all()
    near = policy_loss(config, target + 1e-3, target, target, t, r)
    # The first: an error of 1e-6 of x0 over 1e-5. The second is above the floor.
    np.testing.assert_allclose(near, [5 * 1e-12 / 1e-5, 5 * 1e-3], rtol=1e-3)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_the_optimum_is_in_closed_form(beta):
    """Without the adaptive weight the minimum is v_old + 1/beta E[(2 r - 1)(v - v_old)], by least squares."""
    rng = np.random.default_rng(0)
    old, targets, r = rng.standard_normal(), rng.standard_normal(50), rng.uniform(0, 1, 50)
    optimum = old + np.mean((2 * r - 1) * (targets - old)) / beta
    # The two squares of the loss in v: r (old + beta d - v)^2 + (1 - r)(old - beta d - v)^2, d = v_theta - old.
    loss = lambda v: np.mean(
        r * (old + beta * (v - old) - targets) ** 2 + (1 - r) * (old - beta * (v - old) - targets) ** 2
    )
    fit = np.polyfit([-3, 0, 3], [loss(v) for v in (-3, 0, 3)], 2)
    np.testing.assert_allclose(-fit[1] / (2 * fit[0]), optimum, atol=1e-12)

    # And ours has that gradient where both weights are the same, which at v = v_old they are: t mean|v_old - target|.
    def mine(v):
        one = jnp.full((50, 1, 1), v)
        terms = policy_loss(
            NftConfig(beta=beta, z_c=1), one, jnp.full((50, 1, 1), old), targets[:, None, None], jnp.ones(50), r
        )
        return jnp.mean(terms * np.abs(old - targets) * beta)

    with jax.enable_x64(True):
        slope = jax.grad(mine)(old)
    np.testing.assert_allclose(slope, -2 * beta * np.mean((2 * r - 1) * (targets - old)), rtol=1e-5)


def test_before_the_first_step():
    """Trained = old: the value does not depend on r, the gradient goes with 2 r - 1, and r = 1/2 moves nothing."""
    config = NftConfig()
    _, old, clean, noise, t, _ = (jnp.asarray(x, jnp.float32) for x in samples())
    loss = lambda v, r: policy_loss(config, v, old, noise - clean, t, jnp.full(3, r))
    np.testing.assert_allclose(loss(old, 0.1), loss(old, 0.9), rtol=1e-6)
    gradients = {r: jax.grad(lambda v, r=r: loss(v, r).sum())(old) for r in (0.0, 0.5, 0.75, 1.0)}
    assert (gradients[0.5] == 0).all()
    np.testing.assert_allclose(gradients[0.0], -gradients[1.0], rtol=1e-6)
    np.testing.assert_allclose(gradients[0.75], 0.5 * gradients[1.0], rtol=1e-6)
    assert jnp.abs(gradients[1.0]).max() > 0


def test_no_gradient_reaches_the_old_policy():
    trained, old, clean, noise, t, r = (jnp.asarray(x, jnp.float32) for x in samples())
    gradient = jax.grad(lambda o: policy_loss(NftConfig(), trained, o, noise - clean, t, r).sum())(old)
    assert (gradient == 0).all()


def test_old_policy_schedule():
    assert [float(old_decay(1, n)) for n in (0, 1, 499, 500, 501)] == pytest.approx([0, 0.001, 0.499, 0.5, 0.5])
    assert [float(old_decay(2, n)) for n in (0, 75, 76, 208, 10_000)] == pytest.approx([0, 0, 0.0075, 0.9975, 0.999])
    assert float(old_decay(0, 10_000)) == 0


def test_z_c_does_not_change_small_advantages():
    """What is below the clip has the same gradient whatever z_c is: r is nearer to 1/2, and the loss is larger."""
    _, old, clean, noise, t, _ = (jnp.asarray(x, jnp.float32) for x in samples())
    a = jnp.array([-0.8, 0.2, 0.9])
    slope = lambda z: jax.grad(
        lambda v: policy_loss(
            dataclasses.replace(NftConfig(), z_c=z), v, old, noise - clean, t, 0.5 + a / (2 * z)
        ).sum()
    )(old)
    np.testing.assert_allclose(slope(1.0), slope(5.0), rtol=1e-4, atol=1e-7)
