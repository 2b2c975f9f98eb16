"""GPT-OSS as a text encoder, on a tiny model with one token a byte."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.encoders import harmony
from lens_jax.encoders.gpt_oss import GptOssEncoder, GptOssTextConfig, encode_tokens
from lens_jax.encoders.tokenizer import encode_prompt, pad
from lens_jax.errors import LensError, LensWarning
from lens_jax.models import gpt_oss
from lens_jax.models.gpt_oss import GptOssConfig

TINY = GptOssConfig(
    layers=3, width=64, hidden=32, heads=4, kv_heads=2, head_dim=16, experts=4, experts_per_token=2, vocab=512,
    window=16, dtype="float32", param_dtype="float32",
)  # fmt: skip
# A byte is a token here, so the conversation takes 493 and not 119.
PREFIX, SUFFIX = 398, 95
CONFIG = GptOssTextConfig(selected=(0, 2), max_conversation=900, model=TINY)


@pytest.fixture(scope="module")
def params():
    """Drawn with numpy: `gpt_oss.init` compiles a random generator a leaf, 10 s that test nothing here."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.dtype != np.uint8:
            return jnp.array(0.2 * rng.standard_normal(leaf.shape, np.float32))
        # Blocks have five axes and any bits, scales four and about 2^-4.
        return jnp.array(rng.integers(*((0, 256) if leaf.ndim == 5 else (122, 125)), leaf.shape, np.uint8))

    return jax.tree.map(draw, gpt_oss.abstract_params(TINY, head=False))


@pytest.fixture
def build(params, byte_tokenizer):
    def build(batch_size=2, cache_bytes=10**9, **changes):
        config = dataclasses.replace(CONFIG, **changes)
        return GptOssEncoder(config, params, byte_tokenizer, batch_size=batch_size, cache_bytes=cache_bytes)

    return build


def relative_error(actual, expected) -> float:
    return float(np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected))


@pytest.mark.slow
def test_features_are_those_of_the_whole_conversation(build, params, byte_tokenizer):
    """The shared beginning, the length class and the company of a prompt must not show in its features."""
    prompts = ["a red fox", "", "two otters on a raft, " * 8, "a red fox", " \n"]
    features = build().encode(prompts)
    frame = harmony.image_frame(CONFIG.date)
    assert len(byte_tokenizer.encode_pieces(frame.prefix)) == PREFIX
    assert features.lengths.tolist() == [n + SUFFIX if n else 0 for n in (9, 0, 176, 9, 0)]
    assert len(features.layers) == 2
    assert features.layers[0].shape == (5, 512, 64)
    # What training reads is the same: one implementation.
    encoder = build()
    trained = encoder.config.features(encoder.params, *map(jnp.asarray, encoder.tokens(prompts)))
    for layer, expected in zip(trained, features.layers):
        for row, n in enumerate(features.lengths):
            assert not n or relative_error(layer[row, :n], expected[row, :n]) < 1e-5
            assert not np.asarray(layer)[row, n:].any()
    rows = [encode_prompt(byte_tokenizer, frame, p, 900) for p in (prompts[0], prompts[2])]
    whole = encode_tokens(TINY, params, *pad(rows, 900, byte_tokenizer.pad_token), (0, 2), drop=PREFIX)
    for layer, expected in zip(features.layers, np.asarray(whole)):
        for row, other in ((0, 0), (2, 1), (3, 0)):
            n = features.lengths[row]
            # float32, summed in another order: about 1e-6.
            assert relative_error(layer[row, :n], expected[other, :n]) < 1e-5
        assert not layer[1].any()
        assert not layer[0, features.lengths[0] :].any()


def test_cost_and_padding_follow_the_length_class(build, monkeypatch):
    calls = []
    run = GptOssEncoder._run
    monkeypatch.setattr(GptOssEncoder, "_run", lambda self, rows, width: calls.append(width) or run(self, rows, width))
    encoder = build()
    assert encoder.encode(["short"]).layers[0].shape[1] == 128
    assert encoder.encode(["short", "long " * 40]).layers[0].shape[1] == 512
    assert encoder.encode([""]).layers[0].shape[1] == 64
    assert calls == [128, 512]


def test_cache_is_bounded_and_keeps_what_was_used_last(build, monkeypatch):
    asked = []
    monkeypatch.setattr(
        GptOssEncoder,
        "_run",
        lambda self, rows, width: asked.extend(rows) or np.zeros((len(rows), 2, width, 64), np.float32),
    )
    # A prompt of one letter has 96 tokens: room for three, in float32.
    size = 2 * (1 + SUFFIX) * 64 * 4
    encoder = build(cache_bytes=3 * size)
    encoder.encode(["a", "b", "c"])
    encoder.encode(["a"])
    encoder.encode(["d"])
    assert len(asked) == 4
    encoder.encode(["a", "c", "d"])
    assert len(asked) == 4
    encoder.encode(["b"])
    assert len(asked) == 5
    # More distinct prompts in one call than the cache holds.
    assert encoder.encode([str(i) for i in range(7)]).lengths.tolist() == [1 + SUFFIX] * 7
    assert len(encoder._cache) == 3


def test_alone_or_in_company_to_the_last_bit_with_batches_of_one(build):
    encoder = build(batch_size=1, cache_bytes=0)
    together, alone = encoder.encode(["one cat", "two dogs"]), encoder.encode(["two dogs"])
    for a, b in zip(together.layers, alone.layers):
        np.testing.assert_array_equal(a[1], b[0])


def test_date_changes_features_and_goes_with_them(build):
    features = [build(date=date).encode(["a red fox"]) for date in (CONFIG.date, "2025-01-01")]
    assert [f.date for f in features] == [CONFIG.date, "2025-01-01"]
    one, two = (f.layers[1] for f in features)
    assert one.shape == two.shape
    assert relative_error(one, two) > 1e-6


def test_long_prompt_warns_and_keeps_its_suffix(build):
    encoder = build(max_conversation=700)
    with pytest.warns(LensWarning, match="its end is cut"):
        features = encoder.encode(["x" * 300])
    assert features.lengths.tolist() == [700 - PREFIX]
    assert encoder._ids("fits")[-SUFFIX:] == encoder._ids("x" * (700 - PREFIX - SUFFIX))[-SUFFIX:]


def test_bad_values_say_what_would_do(build, params):
    with pytest.raises(LensError, match="must be a list"):
        build().encode("one string")
    with pytest.raises(LensError, match=r"text layers \(0, 3\) must be different and lie in 0..2"):
        build(selected=(0, 3))
    with pytest.raises(LensError, match=r"text.max_conversation is 400; .* at least 493"):
        build(max_conversation=400)
    for changes in ({"batch_size": 0}, {"date": "today"}):
        with pytest.raises(LensError):
            build(**changes)
    with pytest.raises(LensError, match="the vocabulary has 512"):
        encode_tokens(TINY, params, [[5, 512]], [2], (0,))
