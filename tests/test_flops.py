"""Operation counts against integers worked out by hand for the released size."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lens_jax import flops
from lens_jax.models import autoencoder, eva
from lens_jax.models.autoencoder import AutoencoderConfig
from lens_jax.models.denoiser import LENS
from lens_jax.models.eva import EvaConfig
from lens_jax.models.gpt_oss import GPT_OSS_20B, GptOssConfig


@pytest.mark.parametrize(
    ("image_tokens", "text_tokens", "expected"),
    [
        (1024, 150, 3_606_141_861_888),
        (2304, 150, 8_455_596_146_688),
        (4096, 0, 16_086_311_632_896),
        (4096, 150, 16_868_329_783_296),
        (4096, 256, 17_428_958_674_944),
        (8100, 256, 43_320_572_903_424),
    ],
)
def test_forward(image_tokens, text_tokens, expected):
    assert flops.denoiser_forward(LENS, image_tokens, text_tokens) == expected


@pytest.mark.parametrize("encode", [False, True])
def test_autoencoder_against_the_compiler(encode):
    """Within 5 % of what XLA counts at a size where borders, norms and activations are little of it."""
    config = AutoencoderConfig(dtype="float32")
    params, grid = autoencoder.abstract_params(config), (16, 16)
    if encode:
        counted = flops.autoencoder_encode(config, *grid)
        run, inputs = functools.partial(autoencoder.encode, config), (1, 256, 256, 3)
    else:
        counted = flops.autoencoder_decode(config, *grid)
        run, inputs = functools.partial(autoencoder.decode, config, grid=grid), (1, 256, 128)
    lowered = jax.jit(run).lower(params, jax.ShapeDtypeStruct(inputs, jnp.float32))
    assert counted == pytest.approx(lowered.cost_analysis()["flops"], rel=0.05)


def test_gpt_oss():
    # Two layers, one head of 2 channels, one expert of 32 x 32, three tokens behind one, window of 2.
    c = GptOssConfig(layers=2, width=32, hidden=32, heads=1, kv_heads=1, head_dim=2, experts=1, experts_per_token=1,
                     vocab=8, window=2)  # fmt: skip
    projections, experts = 2 * 32 * 2 * 4, 2 * 32 * 1 + 3 * 2 * 32 * 32
    keys_seen = (2 + 2 + 2) + (2 + 3 + 4)
    assert flops.gpt_oss_forward(c, 3, past=1) == 2 * 3 * (projections + experts) + 4 * 2 * keys_seen
    # 3.0B of the model's 3.6B active parameters are in its layers, the rest in embedding and head.
    assert flops.gpt_oss_forward(GPT_OSS_20B, 1) == pytest.approx(2 * 3.04e9, rel=0.01)


def test_eva():
    # 1,025 tokens of 768: 12 x (4 x 768² x 2 + 2 x 2 x 1,025 x 768 + 3 x 2 x 768 x 2,048) of each, and the patches.
    a_token = 12 * (4_718_592 + 3_148_800 + 9_437_184)
    assert flops.eva_forward(EvaConfig()) == 1025 * a_token + 1024 * 903_168 + 2 * 768 * 4
    # One block, which XLA's count sees whole; norms and activations are little of it at this width.
    config = EvaConfig(image=112, width=256, layers=1, heads=4, hidden=683, dtype="float32", attention="xla")
    lowered = jax.jit(functools.partial(eva.apply, config)).lower(
        eva.abstract_params(config), jax.ShapeDtypeStruct((1, 112, 112, 3), jnp.float32)
    )
    assert flops.eva_forward(config) == pytest.approx(lowered.cost_analysis()["flops"], rel=0.05)


def test_peaks():
    assert flops.peak("NVIDIA H100 80GB HBM3") == 989.4e12
    assert flops.peak("NVIDIA H100 PCIe") == 756e12
    assert flops.peak("TPU v5 lite") == 197e12
    assert flops.peak("cpu") is None
