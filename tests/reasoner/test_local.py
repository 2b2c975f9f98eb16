"""The reasoner by GPT-OSS: its draws, and what becomes of everything that a model may write."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.encoders.gpt_oss import GptOssEncoder, GptOssTextConfig
from lens_jax.encoders.harmony import CHANNEL, END, MESSAGE, START, Control
from lens_jax.errors import LensError
from lens_jax.models import gpt_oss
from lens_jax.models.gpt_oss import GptOssConfig
from lens_jax.reasoner import local
from lens_jax.reasoner.local import LocalReasoner

TINY = GptOssConfig(
    layers=2, width=64, hidden=64, heads=4, kv_heads=2, head_dim=16, experts=4, experts_per_token=2, vocab=512,
    window=16, dtype="float32", param_dtype="float32",
)  # fmt: skip
FINAL = (START, "assistant", CHANNEL, "final", MESSAGE)
RETURN = Control("<|return|>")


@pytest.fixture(scope="module")
def encoder(byte_tokenizer):
    text = GptOssTextConfig(path="tiny", selected=(1,), max_conversation=4096, model=TINY)
    return GptOssEncoder(text, gpt_oss.init(TINY, jax.random.key(0)), byte_tokenizer)


def test_a_rewrite_depends_on_seed_and_number(encoder, monkeypatch):
    """Not on what is beside it: alone, in a batch of four with idle rows, and behind others; whatever was thought."""
    written = []
    generate = local.generate

    def watch(*args, **options):
        tokens, counts = generate(*args, **options)
        written.extend((n, row[:c].tolist()) for n, row, c in zip(options["rows"], tokens, counts) if c)
        return tokens, counts

    monkeypatch.setattr(local, "generate", watch)
    reasoner = LocalReasoner(encoder, "Describe.", thoughts=6, limit=12, temperature=1.0)
    prompts = ["a fox", "two cats on a mat", "a house", "", "rain"]
    found = reasoner.rewrite(prompts, seed=1 << 40)
    together = dict(written)
    assert sorted(together) == [0, 1, 2, 4]
    assert [one.prompt for one in found] == prompts
    assert found[3] == dataclasses.replace(found[3], text="", status="kept", model="", tokens_out=0)
    opened = reasoner._opening.forced
    for tokens in together.values():  # an untrained model never opens its answer
        assert tuple(tokens[6 : 6 + len(opened)]) == opened
        assert len(tokens) == 6 + len(opened) + 12
    written.clear()
    reasoner.rewrite(["", "two cats on a mat"], seed=1 << 40)
    assert dict(written) == {1: together[1]}
    written.clear()
    reasoner.rewrite(["a fox"], seed=3)
    assert dict(written)[0] != together[0]


# What the model writes of each prompt, at the first question and at one that follows.
SCRIPT = {
    "a fox": ("A red fox in tall grass.",),
    'a sign "OPEN"': ('A shop sign that says "CLOSED".',),
    "3 cats": ("Three cats.",),
    "a cat": ("a  cat",),
    "a bomb": ("I'm sorry, but I can't help with that.",),
    "a word": ("word " * 145, "A word."),
    "endless": ("word " * 145, "word " * 146),
    "лиса": ("A fox in a forest.",),
}


def test_what_becomes_of_everything(encoder, byte_tokenizer, monkeypatch):
    # Of which 700 are a prompt's; less the frame of this tokenizer does not allow.
    short = dataclasses.replace(encoder.config, max_conversation=700 + 97 + 22)
    encoder = GptOssEncoder(short, encoder.model, byte_tokenizer)
    asked = []

    def scripted(config, params, ids, lengths, key, *, max_new_tokens, rows, past, pad_token, **_):
        assert past[0].shape[0] == TINY.layers
        tokens, counts = np.full((len(ids), max_new_tokens), pad_token), np.zeros(len(ids), int)
        for row, (given, length) in enumerate(zip(ids, lengths)):
            if not length:
                continue
            text = byte_tokenizer.decode(given[:length])
            asked.append(text)
            prompt, turn = text.split("<|end|>")[0], text.count("<|start|>user")
            if prompt in SCRIPT:
                said = ("thinking", END, *FINAL, SCRIPT[prompt][turn], RETURN)
            else:
                said = {"thoughtless": ("thinking", END, RETURN), "cut": (*FINAL, "A red fo")}[prompt]
            out = byte_tokenizer.encode_pieces((CHANNEL, "analysis", MESSAGE, *said))
            tokens[row, : len(out)], counts[row] = out, len(out)
        return tokens, counts

    monkeypatch.setattr(local, "generate", scripted)
    prompts = [*SCRIPT, "thoughtless", "cut", "x" * 1100]
    found = LocalReasoner(encoder, name="gpt-oss-20b").rewrite(prompts)
    assert [(one.status, one.reason) for one in found] == [
        ("used", ""), ("raw", "lost_text"), ("raw", "lost_number"), ("kept", ""), ("raw", "refused"), ("used", ""),
        ("raw", "too_long"), ("raw", "language"), ("raw", "empty"), ("raw", "truncated"), ("raw", "too_long"),
    ]  # fmt: skip
    assert found[0].text == "A red fox in tall grass."
    assert found[3].text == "a cat"
    assert found[5].text == "A word."
    assert all(one.text == one.prompt for one in found if one.status == "raw")
    assert all("700" in text for text in asked if text.count("<|start|>user"))
    assert sum(text.startswith("a word<|end|>") for text in asked) == 2
    assert found[0].model == "gpt-oss-20b"
    assert len(found[0].instructions) == 16
    assert found[5].tokens_out > 725  # of both answers
    assert found[10].detail == "the prompt is 1111 tokens, and the reasoner reads 1024"
    assert found[0].tokens_out == len("analysis" + "thinking" + "assistantfinal" + found[0].text) + 7


def test_what_it_needs(encoder):
    features = {name: value for name, value in encoder.model.items() if name not in ("norm", "unembed")}
    with pytest.raises(LensError, match="vocabulary head"):
        LocalReasoner(GptOssEncoder(encoder.config, features, encoder.tokenizer))
    with pytest.raises(LensError, match="tokenizer"):
        LocalReasoner(GptOssEncoder(encoder.config, encoder.model, None))
    with pytest.raises(LensError, match="prompt 1 is int"):
        LocalReasoner(encoder).rewrite(["a", 1])


def test_features_are_the_same_with_a_head(encoder):
    """What draws does not change by what writes."""
    features = {name: value for name, value in encoder.model.items() if name not in ("norm", "unembed")}
    without = GptOssEncoder(encoder.config, features, encoder.tokenizer).encode(["a fox"])
    with_head = encoder.encode(["a fox"])
    np.testing.assert_array_equal(jnp.asarray(with_head.layers[0]), without.layers[0])
