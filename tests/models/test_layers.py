"""The product that stands in for Flax's on one CPU."""

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
