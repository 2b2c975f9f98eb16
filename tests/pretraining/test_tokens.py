"""Room for text by caption length, and what is done with captions that do not fit."""

import warnings

import numpy as np
import pytest

from lens_jax.data.buckets import CAPTION_CLASSES, LENS_PRETRAINING, Bucket
from lens_jax.data.mixture import Shape
from lens_jax.encoders.flux import FluxCodecConfig
from lens_jax.encoders.gpt_oss import GptOssTextConfig
from lens_jax.errors import LensError, LensWarning
from lens_jax.pretraining.config import DataConfig, TrainConfig
from lens_jax.pretraining.tokens import CutCaptions, fit_text, token_counts

CONFIG = TrainConfig(
    codec=FluxCodecConfig(), text=GptOssTextConfig(), data=DataConfig(pad_areas=True, joint_multiple=128)
)


def test_token_counts_of_the_report():
    """27 buckets, three lengths; with room for the whole text each a multiple of 128 (spec of cuDNN's blocks)."""
    counts = token_counts(CONFIG, [Shape(bucket) for bucket in LENS_PRETRAINING])
    assert len(counts) == 27
    assert {(c.padded, c.text) for c in counts.values()} == {(1064, 472), (2400, 416), (4232, 504)}
    assert {c.padded + c.text for c in counts.values()} == {1536, 2816, 4736}
    assert max(c.image for c in counts.values()) == 4232


def test_a_class_has_room_for_its_captions_and_little_more():
    shapes = [Shape(bucket, bound) for bucket in LENS_PRETRAINING for bound in (*CAPTION_CLASSES, 0)]
    for sequence in (1, 8):
        counts = token_counts(CONFIG, shapes, sequence)
        for shape, tokens in counts.items():
            bound = shape.text_class or CONFIG.text.max_tokens
            assert bound <= tokens.text < bound + 128 * sequence
            assert (tokens.padded + tokens.text) % 128 == 0
            assert tokens.text % sequence == 0
        # Few programs to compile: rooms of an area are multiples of 128 apart.
        assert len({(tokens.padded, tokens.text) for tokens in counts.values()}) <= 12
    # A class above what the run's encoder reads asks for no more than that.
    short = TrainConfig(codec=FluxCodecConfig(), text=GptOssTextConfig(max_conversation=97 + 100))
    assert token_counts(short, [Shape(Bucket(512, 512), 256)])[Shape(Bucket(512, 512), 256)].text == 100
    with pytest.raises(LensError, match=r"mesh\.sequence 64 does not divide the 1056 image tokens of 528x512"):
        token_counts(short, [Shape(Bucket(528, 512))], 64)


@pytest.mark.parametrize("width", [(), (3,)])
def test_a_caption_that_is_too_long_loses_its_own_end(width):
    """What stands behind every caption stays, as if the caption itself had been cut."""
    lengths = np.array([4, 9, 0, 7], np.int32)
    values = np.zeros((4, 10, *width), np.int32)
    for row, length in enumerate(lengths):
        values[row, :length] = (10 * row + np.arange(length)).reshape(-1, *[1] * len(width))
    fitted = fit_text(values, lengths, 6, 2)
    first = fitted.reshape(4, 6, -1)[..., 0]
    assert first.tolist() == [[0, 1, 2, 3, 0, 0], [10, 11, 12, 13, 17, 18], [0] * 6, [30, 31, 32, 33, 35, 36]]
    wide = fit_text(values, lengths, 12, 2)
    np.testing.assert_array_equal(wide[:, :10], values)
    assert not wide[:, 10:].any()


def test_cut_captions_are_said_ever_more_seldom():
    counter = CutCaptions()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", LensWarning)
        for _ in range(500):
            counter.add(1, 4)
            counter.add(0, 4)
    assert (counter.cut, counter.seen) == (500, 4000)
    found = [str(warning.message).split(" captions")[0] for warning in said]
    assert found == ["1 of 4", "10 of 76", "100 of 796"]
