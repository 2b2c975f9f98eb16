"""The kernels that run without their hardware give what a plain softmax over the valid keys gives."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.models import attention, attention_cpu, attention_tpu
from lens_jax.parallel import MeshConfig
from lens_jax.planning import topology

IMAGE, TEXT = 150, 60


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
    # Two blocks of 128, of which the second is partly padding.
    monkeypatch.setattr(attention_tpu, "_LARGEST", 128)
    monkeypatch.setattr(attention_tpu, "splash", functools.partial(attention_tpu.splash, interpret=True))
    # Four parts of the queries, of which the last is partly padding.
    monkeypatch.setattr(attention_cpu, "SCORES", 60 * (IMAGE + TEXT))
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


@pytest.mark.slow
def test_splash_with_keys_in_parts_of_a_block(monkeypatch):
    """A block of 512 whose keys are taken 256 at a time, and 42 places of padding; values and gradients."""
    rng = np.random.default_rng(2)
    q, k, v, cotangent = (rng.standard_normal((2, 470, 1, 64), np.float32) for _ in range(4))
    lengths = np.array([300, 470], np.int32)
    cotangent[0, 300:] = 0
    assert attention_tpu.block(470) == 512
    assert attention_tpu._blocks(512).block_kv_compute == 256

    def loss(kernel, *qkv):
        return jnp.vdot(kernel(*qkv, lengths), cotangent)

    splash = functools.partial(attention_tpu.splash, name="attention", interpret=True)
    ours = jax.value_and_grad(functools.partial(loss, splash), (0, 1, 2))(q, k, v)
    wanted = jax.value_and_grad(functools.partial(loss, attention._xla), (0, 1, 2))(q, k, v)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=2e-5, rtol=1e-4), ours, wanted)


@pytest.mark.parametrize(
    ("length", "side"),
    [
        (40, 128), (1024, 1024), (1152, 1152), (1280, 1280), (1408, 768), (2560, 1280), (2688, 896), (4424, 896),
        (4608, 1152),
    ],
)  # fmt: skip
def test_blocks_suit_the_length(length, side):
    """As few and as large as padding allows: never more than an eighth of the sequence."""
    assert attention_tpu.block(length) == side
    assert length <= 128 or -(-length // side) * side < 1.125 * length


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU's compiler")
@pytest.mark.parametrize("hardware", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("length", [1280, 2560, 4480, 4608])
def test_blocks_fit_into_the_memory_of_a_core(hardware, length):
    """The TPU's compiler takes forward and backward kernels of the released size, at the lengths of its three areas."""
    device = topology.slice_mesh(MeshConfig(), hardware, 4).devices.flat[0]
    place = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2, length, 24, 64), jnp.bfloat16, sharding=place)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=place)
    splash = functools.partial(attention_tpu.splash, name="attention")
    gradient = jax.grad(lambda q, k, v, n: jnp.sum(splash(q, k, v, n).astype(jnp.float32)), (0, 1, 2))
    jax.jit(gradient).trace(x, x, x, lengths).lower(lowering_platforms=("tpu",)).compile()
