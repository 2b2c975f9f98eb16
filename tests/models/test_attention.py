"""The kernels that run without their hardware give what a plain softmax over the valid keys gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.models import attention

IMAGE, TEXT = 150, 60  # together 210 keys: two blocks of splash, the second one partly padding


def inputs(dim: int):
    """Queries, keys, values [4, S, 2, dim] of both streams, and lengths: no text, some, all but one, all."""
    rng = np.random.default_rng(0)
    parts = [tuple(rng.standard_normal((4, n, 2, dim), np.float32) for _ in range(3)) for n in (IMAGE, TEXT)]
    return *parts, np.array([0, 17, TEXT - 1, TEXT], np.int32)


def plain(image, text, lengths, n_image):
    """float32, every weight of an invalid key exactly 0."""
    q, k, v = (jnp.concatenate([x[:, :n_image], y], 1) for x, y in zip(image, text))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") / np.sqrt(q.shape[-1])
    valid = jnp.arange(q.shape[1]) < (n_image + lengths)[:, None]
    weights = jax.nn.softmax(scores, where=valid[:, None, None], axis=-1)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest")
    return mixed[:, :n_image], mixed[:, n_image:]


@pytest.mark.parametrize("n_image", [IMAGE, 101])
@pytest.mark.parametrize(
    ("kernel", "dim"), [("xla", 64), ("blocked", 64), ("blocked", 16), ("splash", 64), ("splash", 16)]
)
def test_kernels_agree_with_a_plain_softmax(monkeypatch, kernel, dim, n_image):
    """Values and gradients of what is valid, with ragged lengths, rows of image only, and padded image tokens."""
    monkeypatch.setitem(attention._KERNELS, "splash", functools.partial(attention._splash, interpret=True))
    # Four parts of the queries, of which the last is partly padding.
    monkeypatch.setattr(attention, "_SCORES", 60 * (IMAGE + TEXT))
    image, text, lengths = inputs(dim)
    rng = np.random.default_rng(1)
    cotangents = [rng.standard_normal((4, n, 2, dim), np.float32) for n in (IMAGE, TEXT)]
    # Padding counts for nothing: neither what it gives nor what it is given.
    cotangents[0][:, n_image:] = 0
    cotangents[1][np.arange(TEXT) >= lengths[:, None]] = 0

    def actual(image, text):
        offset = None if n_image == IMAGE else jnp.int32(n_image)
        mixed = attention.attend(image, text, n_image + lengths, offset, kernel)
        return sum(jnp.vdot(x, c) for x, c in zip(mixed, cotangents)), mixed

    def expected(image, text):
        mixed = plain(image, text, lengths, n_image)
        return jnp.vdot(mixed[0], cotangents[0][:, :n_image]) + jnp.vdot(mixed[1], cotangents[1]), mixed

    (_, mixed), gradients = jax.jit(jax.value_and_grad(actual, (0, 1), has_aux=True))(image, text)
    (_, wanted), wanted_gradients = jax.value_and_grad(expected, (0, 1), has_aux=True)(image, text)
    np.testing.assert_allclose(mixed[0][:, :n_image], wanted[0], atol=2e-6)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(mixed[1][row, :length], wanted[1][row, :length], atol=2e-6)
    assert np.isfinite(mixed[0]).all()
    assert np.isfinite(mixed[1]).all()
    # Online and plain softmax round differently: at most 3e-6 of gradients up to 2 is seen.
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5), gradients, wanted_gradients)
    assert not np.any(gradients[0][1][:, n_image:])
    assert not np.any(gradients[1][2][0])  # values of text in the row that has none
