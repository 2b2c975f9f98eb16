"""Operation counts against integers worked out by hand for the released size."""

import pytest

from lens_jax import flops
from lens_jax.models.denoiser import LENS


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


def test_peaks():
    assert flops.peak("NVIDIA H100 80GB HBM3") == 989.4e12
    assert flops.peak("NVIDIA H100 PCIe") == 756e12
    assert flops.peak("TPU v5 lite") == 197e12
    assert flops.peak("cpu") is None
