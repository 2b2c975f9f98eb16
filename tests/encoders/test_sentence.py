"""The sentence encoder: clauses, empty prompts, languages, and vectors that depend on nothing around them."""

import threading

import numpy as np
import pytest

from lens_jax.encoders import sentence
from lens_jax.encoders.sentence import Letter, SentenceEncoder, SentenceEncoderConfig, split_prompt
from lens_jax.errors import LensError


@pytest.fixture(scope="module")
def encoder():
    return SentenceEncoder(SentenceEncoderConfig(max_tokens=3))


def test_clauses():
    assert split_prompt("red apple (links), car (rechts); blue", 5) == ["red apple", "links", "car", "rechts", "blue"]
    assert split_prompt("红苹果，汽车。", 4) == ["红苹果", "汽车"]
    assert split_prompt("e, b, c, d", 2) == ["e", "b c d"]
    assert split_prompt(" , ;", 2) == []
    joints = "Two small foxes to the left of a house and a Band in the centre on a pink background"
    parts = ["Two", "small", "foxes", "to the left of", "house", "Band", "in the centre", "on a pink background"]
    assert split_prompt(joints, 9) == parts
    assert split_prompt("fox (three times, links), the", 9) == ["fox", "three times", "links", "the"]
    assert split_prompt("above water", 9) == ["above", "water"]


def test_what_is_quoted_is_spelled():
    for prompt, clause in (
        ('mot "a, B" en haut, red', "mot en haut"),
        ("das Wort „a, B“ oben, red", "das Wort oben"),
        ("上面是「a, B」，red", "上面是"),
    ):
        letters = [Letter("a", 0), Letter(",", 1), Letter("B", 3)]
        assert split_prompt(prompt, 9) == [clause, *letters, "red"]
    assert split_prompt('cat, "ABCDEF"', 4) == ["cat", Letter("A", 0), Letter("B", 1), Letter("C", 2)]
    assert split_prompt('5" wide, 6 feet', 4) == ['5" wide', "6 feet"]
    (layer,) = SentenceEncoder(SentenceEncoderConfig()).encode(['"AaBA"']).layers
    np.testing.assert_allclose(np.linalg.norm(layer[0], axis=-1), 1, rtol=1e-5)
    upper, lower, other, again = layer[0] @ layer[0, 0]
    # The same letter elsewhere shares its letter, another one nothing; case is a shade.
    assert upper > again > 0.4 > 0.2 > abs(other)
    assert again - 0.1 < lower < again + 0.1


def test_shapes_and_lengths(encoder):
    features = encoder.encode(["red apple", "", "cat, dog, bird, fish"])
    assert features.lengths.tolist() == [1, 0, 3]
    (layer,) = features.layers
    assert layer.shape == (3, 3, encoder.width)
    assert not layer[1].any()
    assert not layer[0, 1:].any()


def test_a_vector_depends_on_its_clause_alone():
    alone = SentenceEncoder(SentenceEncoderConfig()).encode(["cat"])
    beside = SentenceEncoder(SentenceEncoderConfig()).encode(["a very long sentence about the weather", "dog, cat"])
    np.testing.assert_array_equal(alone.layers[0][0, 0], beside.layers[0][1, 1])


def test_encoders_of_a_process_take_turns(monkeypatch):
    """BLAS's limit of one thread is the process's: the encoder that leaves first would lift it for the other."""
    inside, most, another = set(), [], threading.Event()

    class Model:
        def encode(self, texts):
            inside.add(*texts)
            most.append(len(inside))
            if len(inside) > 1:
                another.set()
            another.wait(0.2)  # the time that another has to come in
            inside.discard(*texts)
            return np.ones((1, 512), np.float32)

    monkeypatch.setattr(sentence, "_model", Model)
    encoders = [SentenceEncoder(SentenceEncoderConfig()) for _ in range(2)]
    threads = [threading.Thread(target=e.encode, args=([f"clause {i}"],)) for i, e in enumerate(encoders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1]


def test_the_cache_is_bounded_by_its_bytes(monkeypatch):
    asked = []

    class Model:
        def encode(self, texts):
            asked.extend(texts)
            return np.ones((1, 512), np.float32)

    monkeypatch.setattr(sentence, "_model", Model)
    encoder = SentenceEncoder(SentenceEncoderConfig(), cache_bytes=3 * 512 * 4)
    encoder.encode([f"clause {i}" for i in range(100)])
    assert len(encoder._cache) == 3
    encoder.encode(["clause 99", "clause 0"])
    assert asked[100:] == ["clause 0"]


def test_languages_meet(encoder):
    apple, manzana, car = encoder.encode(["red apple", "manzana roja", "racing car"]).layers[0][:, 0]
    assert apple @ manzana > 0.8 > 0.5 > apple @ car


def test_a_prompt_that_is_not_text(encoder):
    with pytest.raises(LensError, match="prompt 1 is int; a prompt must be text"):
        encoder.encode(["cat", 3])
    with pytest.raises(LensError, match="prompt 0 holds bytes that are not text"):
        encoder.encode([b"\xff\xfe".decode("utf-8", "surrogateescape")])
