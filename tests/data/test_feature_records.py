"""Records of latents and text features: exact, nothing copied that is not asked for, damage named."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from lens_jax.data import feature_records
from lens_jax.data.feature_records import FeatureRecord
from lens_jax.errors import LensError


def example(dtype=np.float32) -> FeatureRecord:
    rng = np.random.default_rng(0)
    text = rng.standard_normal((2, 3, 8)).astype(dtype)
    captions = {"en": (text, text[:, 1:]), "de": (text[:, :0],)}
    return FeatureRecord(rng.standard_normal((4, 16)).astype(dtype), captions, 32, 48, "a", "b")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip(dtype):
    record = example(dtype)
    back = feature_records.decode(feature_records.encode(record), "here")
    assert back.latents.dtype == back.captions["en"][0].dtype == dtype
    np.testing.assert_array_equal(back.latents, record.latents)
    assert {name: len(texts) for name, texts in back.captions.items()} == {"en": 2, "de": 1}
    for name, texts in record.captions.items():
        for one, other in zip(texts, back.captions[name], strict=True):
            np.testing.assert_array_equal(one, other)
    assert (back.height, back.width, back.source, back.licence, back.longest) == (32, 48, "a", "b", 3)


def test_captions_that_are_not_chosen_cost_nothing():
    """Of sixteen captions' features, 8 MB, decoding copies none: all are views of the entry."""
    texts = tuple(np.full((4, 32, 1024), n, np.float32) for n in range(16))
    data = feature_records.encode(FeatureRecord(np.zeros((4, 16), np.float32), {"en": texts}, 32, 32))
    tracemalloc.start()
    record = feature_records.decode(data, "here")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 50_000 < len(data) / 100
    assert all(np.shares_memory(x, np.frombuffer(data, np.uint8)) for x in (record.latents, *record.captions["en"]))
    assert record.captions["en"][7].flags.aligned
    assert (record.captions["en"][7] == 7).all()


def test_damaged_records_are_told():
    rng = np.random.default_rng(0)
    data = feature_records.encode(example())
    damaged = [data[:n] for n in range(len(data))] + [data + b"x", b"\xff" * 40]
    for _ in range(600):
        broken = bytearray(data)
        broken[rng.integers(300)] ^= 1 << rng.integers(8)
        damaged.append(bytes(broken))
    messages = []
    for bad in damaged:
        try:
            feature_records.decode(bad, "here")
        except LensError as error:
            messages.append(str(error))
    assert len(messages) > len(data)
    assert all(message.startswith("here: ") and "\n" not in message for message in messages)
