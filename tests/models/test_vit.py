"""The vision transformer: kernels agree, its operations are counted, and what it cannot be is refused.

Its numbers are compared with those of transformers in `tests/data/engine/test_networks.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax import flops
from lens_jax.errors import LensError
from lens_jax.models import vit
from lens_jax.models.vit import VitConfig

SMALL = VitConfig(image=34, patch=2, width=16, layers=2, heads=4, hidden=24, outputs=6, dtype="float32")
KINDS = {"class": 6, "attention": 0, "mean": 6}


@pytest.mark.slow
@pytest.mark.parametrize("pool", KINDS)
def test_kernels_agree(pool):
    """With more scores than a CPU's kernel takes at a time, 8 x 4 x 290²; and an image upside down is another."""
    config = dataclasses.replace(SMALL, pool=pool, outputs=KINDS[pool])
    params = vit.init(config, jax.random.key(0))
    pixels = jax.random.normal(jax.random.key(1), (8, 34, 34, 3))
    found = {}
    for kernel in ("blocked", "xla"):
        run = jax.jit(functools.partial(vit.apply, dataclasses.replace(config, attention=kernel)))
        found[kernel] = run(params, pixels)
    assert found["xla"].shape == (8, config.result)
    np.testing.assert_allclose(found["blocked"], found["xla"], rtol=1e-5, atol=1e-5)
    turned = run(params, pixels[:, ::-1])
    assert np.abs(turned - found["xla"]).max() > 1e-3


@pytest.mark.parametrize("pool", KINDS)
def test_operations_against_the_compiler(pool):
    """One block, which XLA's count sees whole; norms and activations are little of it at this width."""
    config = VitConfig(
        image=112, width=256, layers=1, heads=4, hidden=1024, pool=pool, outputs=KINDS[pool], dtype="float32",
        attention="xla",
    )  # fmt: skip
    lowered = jax.jit(functools.partial(vit.apply, config)).lower(
        vit.abstract_params(config), jax.ShapeDtypeStruct((1, 112, 112, 3), jnp.float32)
    )
    assert flops.vit_forward(config) == pytest.approx(lowered.cost_analysis()["flops"], rel=0.05)


def test_operations_of_the_released():
    """162, 670 and 35 GFLOP an image: 257 tokens of 1,024, 729 of 1,152 and 196 of 768."""
    counts = [flops.vit_forward(c) for c in (vit.CLIP_L14, vit.SIGLIP_SO400M_384, vit.SIGLIP2_BASE_224)]
    a_token = 24 * (8 * 1024**2 + 4 * 1024 * 4096 + 4 * 257 * 1024)
    assert counts[0] == 257 * a_token + 256 * 2 * 3 * 14**2 * 1024 + 2 * 1024 * 768 == 162_025_537_536
    assert counts[1:] == [670_346_449_920, 34_941_766_656]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 18}, "vit.width 18 must be a multiple of vit.heads 4"),
        ({"patch": 35}, "vit.patch 35 is larger than vit.image 34"),
        ({"layers": 0}, "vit.layers is 0; it must be positive"),
        ({"pool": "attention"}, "vit.outputs is 6; accepted: 0 with"),
        ({"outputs": 0}, "vit.outputs is 0; accepted: .* at least 1"),
        ({"activation": "relu"}, "vit.activation is 'relu'; accepted: quick_gelu, gelu_tanh"),
        ({"dtype": "float16"}, "vit.dtype is 'float16'; accepted"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(LensError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_pixels_of_another_size_are_refused():
    with pytest.raises(LensError, match=r"pixels are \[1, 34, 36, 3\]; accepted: \[B, 34, 34, 3\]"):
        vit.apply(SMALL, vit.abstract_params(SMALL), jnp.zeros((1, 34, 36, 3)))
