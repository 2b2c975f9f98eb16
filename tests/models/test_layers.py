"""The product that stands in for Flax's on one CPU, and the time embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.models import layers


@pytest.mark.parametrize(("inside", "outside"), [((6,), (2, 5)), ((2, 8), (3,))])
def test_matrix_product_is_dot_general(inside, outside):
    """Values, both gradients, a directional derivative and one of a gradient, batched over kernels too."""
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(shape, np.float32) for shape in ((3, 4, *inside), (7, *inside, *outside)))
    axes = tuple(range(2, 2 + len(inside))), tuple(range(len(inside)))

    def results(product):
        loss = lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel, (axes, ((), ())))))
        gradient = jax.grad(loss, (0, 1))
        one = lambda kernel: (
            loss(x, kernel), gradient(x, kernel), jax.jvp(loss, (x, kernel), (2 * x, kernel))[1],
            jax.jvp(gradient, (x, kernel), (x, kernel))[1],
        )  # fmt: skip
        return jax.tree.leaves(jax.vmap(one)(kernel))

    for ours, expected in zip(results(layers.matrix_product), results(jax.lax.dot_general)):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_factor_of_the_timestep_comes_last():
    """1000 (t f) in float32 as in the release, compiled: XLA must not put the factor into the constant beside it."""
    t = np.random.default_rng(0).random(500, np.float32)
    exponents = np.float32(-np.log(10_000.0)) * np.arange(128, dtype=np.float32) / np.float32(128)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (np.float32(1000) * (t[:, None] * frequencies)).astype(np.float64)
    features = jax.jit(layers.timestep_features)(t)
    # The error of a cosine; the other order is 6e-5 off.
    np.testing.assert_allclose(features, np.concatenate([np.cos(angles), np.sin(angles)], 1), rtol=0, atol=1e-6)
