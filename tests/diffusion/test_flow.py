"""Noise levels, interpolation and the velocity loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lens_jax.diffusion import flow, losses
from lens_jax.diffusion.flow import FlowConfig
from lens_jax.errors import LensError


def test_mu_of_the_report():
    config = FlowConfig()
    for tokens, mu in {256: 1.0, 1024: 1.06, 4096: 1.3, 4232: 1.310625}.items():
        assert flow.noise_level_mu(config, tokens) == pytest.approx(mu)


@pytest.mark.parametrize("draw", ["sample", "quantiles"])
def test_noise_levels_are_logit_normal(draw):
    config, count = FlowConfig(), 4000
    if draw == "sample":
        t = flow.sample_noise_levels(config, jax.random.key(0), count, 1024)
    else:
        t = flow.noise_level_quantiles(config, count, 1024)
    t = np.asarray(t, np.float64)
    assert ((t > 0) & (t < 1)).all()
    logit = np.log(t / (1 - t))
    # Kolmogorov-Smirnov: 4,000 draws of the right law exceed 0.026 once in a hundred.
    assert stats.kstest(logit - 1.06, "norm").statistic < 0.026


def test_loss_is_zero_for_the_true_velocity_and_its_square_otherwise():
    latents, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    t = jnp.array([0.1, 0.5, 0.9])

    def true_velocity(x, t):
        # Known from the noisy latents alone: noise - clean = (x - clean) / t.
        return (x - latents) / t[:, None, None]

    np.testing.assert_allclose(losses.velocity_loss(true_velocity, latents, t, noise), 0, atol=1e-10)
    off = lambda x, t: true_velocity(x, t) + 2
    np.testing.assert_allclose(losses.velocity_loss(off, latents, t, noise), 4, rtol=1e-4)


def test_caption_dropout_sets_lengths_to_zero():
    lengths = jnp.full(2000, 7)
    dropped = flow.drop_captions(FlowConfig(caption_dropout=0.25), jax.random.key(0), lengths)
    assert set(np.unique(dropped)) == {0, 7}
    assert 0.2 < (dropped == 0).mean() < 0.3
    with pytest.raises(LensError, match="caption_dropout is 1"):
        FlowConfig(caption_dropout=1)
