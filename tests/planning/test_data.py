"""What is expected of data that is not there yet: sizes, classes of caption lengths, and the padding of both."""

import dataclasses

import pytest

from lens_jax import config as config_files
from lens_jax.planning.data import caption_lengths, data_use, padding
from lens_jax.pretraining.config import TrainConfig


@pytest.mark.parametrize(("name", "without"), [("pretrain_512", 0.2), ("pretrain_mixed", 0.1)])
def test_padding_of_captions_of_the_report(name, without):
    """The right value of a fault: at most a tenth of all tokens is padding; without classes it was twice as much."""
    config = config_files.load(name, TrainConfig)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path="nowhere"))
    data = data_use(config, 1)
    assert sum(use.share for use in data.buckets) == pytest.approx(1)
    whole = padding(config, data.buckets, "all")
    assert whole.waste <= 0.1
    # At the worst size, 352x704, 9 % of the image tokens are there for the others of its area.
    for bucket in {use.bucket for use in data.buckets}:
        assert padding(config, [use for use in data.buckets if use.bucket == bucket], str(bucket)).waste <= 0.145
    plain = dataclasses.replace(config, data=dataclasses.replace(config.data, caption_classes=()))
    assert padding(plain, data_use(plain, 1).buckets, "all").waste > without
    # The classes change nothing about the captions themselves, nor about the areas.
    mean = lambda data: sum(use.share * use.text for use in data.buckets)
    assert mean(data) == pytest.approx(mean(data_use(plain, 1)), rel=0.01)
    for area in {use.area for use in data.buckets}:
        share = sum(use.share for use in data.buckets if use.area == area)
        assert share == pytest.approx(1 if name == "pretrain_512" else 1 / 3)


def test_lengths_have_the_mean_that_is_asked_for():
    config = config_files.load("pretrain_512", TrainConfig)
    lengths = caption_lengths(config, 150)
    assert sum(lengths) / len(lengths) == pytest.approx(172, abs=1)
    assert max(lengths) <= config.text.max_tokens
    assert caption_lengths(config_files.load("quickstart", TrainConfig), 3) == [3]
