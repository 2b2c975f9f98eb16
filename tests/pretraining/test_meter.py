"""What pre-training measures of its steps, against numbers worked out by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from lens_jax import flops
from lens_jax.data.buckets import Bucket
from lens_jax.data.mixture import Shape
from lens_jax.encoders.linear import LinearCodecConfig
from lens_jax.models.denoiser import LENS
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.meter import Meter
from lens_jax.pretraining.tokens import Tokens

# Operations of a forward pass of the released size, as in test_flops: (image tokens, text tokens).
FORWARD = {
    (1024, 150): 3_606_141_861_888,
    (4096, 0): 16_086_311_632_896,
    (4096, 150): 16_868_329_783_296,
    (4096, 256): 17_428_958_674_944,
}


def batch_of(side: int, lengths: list[int]) -> dict:
    return {"bucket": (side, side), "text_class": 0, "text_lengths": np.array(lengths, np.int32)}


def meter_of(config: TrainConfig, text: int) -> Meter:
    """For squares of 128 and 256 pixels, with room for so many text tokens, on one host."""
    counts = {Shape(Bucket(s, s)): Tokens((s // 4, s // 4), (s // 4) ** 2, text) for s in (128, 256)}
    return Meter(config, counts, lambda rows: rows)


def numbers(loss: float, finite: bool = True) -> dict:
    """What a step returns, of which two samples fell into noise level 1."""
    bins = {"noise_bin_loss": 2 * loss * np.eye(5)[1], "noise_bin_count": 2 * np.eye(5)[1]}
    return {"loss": loss, "losses": [loss], "finite": finite, **bins}


@pytest.fixture
def lens():
    """The released size, where 4 x 4 pixels are a token; a tenth of the captions is dropped."""
    model = dataclasses.replace(LENS, remat="full", attention="xla")
    return dataclasses.replace(TrainConfig(), model=model, codec=LinearCodecConfig(patch=4, components=48))


def test_speed_is_that_of_the_exact_counts(lens, monkeypatch):
    """One step of two images of 64 x 64 tokens with 150 and 256 of 256 text tokens, in ten seconds, by hand."""
    monkeypatch.setattr(flops, "peak", lambda kind: 100e12)
    meter = meter_of(lens, 256)
    meter.dispatch(batch_of(256, [150, 256]))
    meter.add(numbers(1.0))
    values = meter.record(10.0)
    devices = jax.device_count()
    model = 3 * (0.9 * (FORWARD[4096, 150] + FORWARD[4096, 256]) + 0.1 * 2 * FORWARD[4096, 0])
    real, computed = 2 * 4096 + 0.9 * (150 + 256), 2 * (4096 + 256)
    outside = 4 * 128 * 1536 * 4096 + 2 * 4 * 2880 * 1536 * 256 + 2 * 256 * 1536 + 6 * 1536**2
    expected = {
        "images_per_second": 0.2,
        "tokens_per_second": real / 10,
        "tflops_per_second": model / 1e13,
        "tflops_per_second_per_device": model / 1e13 / devices,
        "mfu": model / 10 / devices / 100e12,
        # Forward, the blocks forward again, and backward at twice the cost, padding included.
        "hfu": 2 * (4 * FORWARD[4096, 256] - outside) / 10 / devices / 100e12,
        "padding_share": 1 - real / computed,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_no_share_of_an_unknown_peak(lens):
    meter = meter_of(lens, 150)
    meter.dispatch(batch_of(128, [150]))
    meter.add(numbers(1.0))
    values = meter.record(1.0)
    assert values["tflops_per_second"] == pytest.approx(
        3 * (0.9 * FORWARD[1024, 150] + 0.1 * flops.denoiser_forward(LENS, 1024, 0)) / 1e12
    )
    assert not {"mfu", "hfu"} & values.keys()


def test_losses_stand_under_the_size_and_step_they_are_of(lens):
    """A step's numbers arrive when the next one, of another size, has been dispatched; a skipped one does not count."""
    meter = meter_of(lens, 1)
    steps = [(256, 1.0, True), (128, 2.0, True), (256, 3.0, True), (256, float("nan"), False), (128, 9.0, True)]
    for i, (side, _, _) in enumerate(steps):
        meter.dispatch(batch_of(side, [1, 1]))
        if i:
            meter.add(numbers(*steps[i - 1][1:]))
    values = meter.record(5.0)
    assert values["loss_by_bucket"] == {"128x128": 2.0, "256x256": 2.0}
    np.testing.assert_array_equal(values["loss_by_noise_level"], [np.nan, 2, np.nan, np.nan, np.nan])
    assert values["images_per_second"] == 8 / 5
    # The last one belongs to the next record.
    meter.add(numbers(9.0))
    assert meter.record(5.0)["loss_by_bucket"] == {"128x128": 9.0}


def test_losses_of_an_update_of_two_sizes_stand_apart(lens):
    meter = meter_of(dataclasses.replace(lens, accumulation=2), 1)
    for _ in range(2):
        meter.dispatch(batch_of(256, [1, 1]))
        meter.dispatch(batch_of(128, [1, 1]))
        meter.add({**numbers(3.0), "losses": [2.0, 4.0]})
    values = meter.record(5.0)
    assert values["loss_by_bucket"] == {"128x128": 4.0, "256x256": 2.0}
