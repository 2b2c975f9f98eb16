"""GPT-OSS against the answers of transformers' own forward pass, and properties that must hold at any size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.convert import gpt_oss as convert_gpt_oss
from lens_jax.convert.folder import open_component
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.errors import LensError
from lens_jax.models import experts as moe
from lens_jax.models import gpt_oss, mxfp4
from lens_jax.models.generate import Opening, generate
from lens_jax.models.gpt_oss import GPT_OSS_20B, GptOssConfig

TAPS = (1, 2, 4, 5)

# Compiled once for all tests: the configs are hashable and the shapes of most tests agree.
hidden_states = jax.jit(gpt_oss.hidden_states, static_argnums=(0, 4))
logits = jax.jit(gpt_oss.logits, static_argnums=0)


def relative_error(actual, expected) -> float:
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def release(goldens):
    """Config, parameters, ids, lengths and answers of the tiny release."""
    folder = goldens / "tiny_release"
    config = convert_gpt_oss.read_config(folder / "text_encoder" / "config.json", dtype="float32")
    params = convert_gpt_oss.from_release(config, open_component(folder / "text_encoder"), str(folder))
    io = SafetensorsFile(folder / "golden_io.safetensors")
    lengths = io["attention_mask"].sum(1).astype(np.int32)
    return config, params, io["input_ids"].astype(np.int32), lengths, io


def real(array, lengths):
    """The valid tokens of [..., B, T, width] as one array."""
    array = np.asarray(array)
    return np.concatenate([array[..., row, :n, :] for row, n in enumerate(lengths)], axis=-2)


def test_matches_release(release):
    config, params, ids, lengths, io = release
    tapped = hidden_states(config, params, ids, lengths, TAPS)
    for layer, tap in zip(tapped, TAPS):
        # float32 in another order of summation; 1e-6 is measured, the golden's own noise is about as large.
        assert relative_error(real(layer, lengths), real(io[f"hidden_states.{tap}"], lengths)) <= 5e-6
    scores = logits(config, params, np.pad(ids, ((0, 0), (0, 10))), lengths)
    assert relative_error(real(scores, lengths), real(io["logits"], lengths)) <= 5e-6


def test_released_size():
    assert gpt_oss.parameter_count(GPT_OSS_20B) == 20_914_757_184
    leaves = jax.tree.leaves(gpt_oss.abstract_params(GPT_OSS_20B))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == 13_761_264_768
    features = jax.tree.leaves(gpt_oss.abstract_params(GPT_OSS_20B, head=False))
    assert sum(leaf.size for leaf in leaves) - sum(leaf.size for leaf in features) == 201_088 * 2880 + 2880


def test_init_fills_the_tree():
    config = GptOssConfig(
        layers=1, width=32, hidden=32, heads=2, kv_heads=1, head_dim=8, experts=2, experts_per_token=1, vocab=16
    )
    params = jax.jit(gpt_oss.init, static_argnums=0)(config, jax.random.key(0, impl="rbg"))
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(params) == shapes(gpt_oss.abstract_params(config))
    assert float(jnp.std(params["embed"].astype(jnp.float32))) == pytest.approx(0.02, rel=0.2)
    experts = {name: leaf[0] for name, leaf in params["layers"]["experts"]["down"].items()}
    assert float(jnp.std(mxfp4.dequantise(experts["blocks"], experts["scales"]))) == pytest.approx(0.023, rel=0.1)


def test_yarn_of_the_release():
    frequencies, factor = gpt_oss.rotary_frequencies(GPT_OSS_20B)
    assert factor == pytest.approx(1.3465735902799727, abs=1e-15)
    assert frequencies.shape == (32,)
    assert frequencies.dtype == np.float32
    expected = {0: 1, 8: 0.050813275, 9: 0.031705696, 16: 0.00045648392, 17: 1.293187e-4, 18: 3.8308812e-05}
    expected[31] = 3.0235114e-07
    for i, value in expected.items():
        assert frequencies[i] == pytest.approx(value, rel=2e-7), i
    # Truncated bounds, the default of transformers, would change entry 17 by 76 %.
    truncated, _ = gpt_oss.rotary_frequencies(dataclasses.replace(GPT_OSS_20B, rope_truncate=True))
    assert truncated[17] / frequencies[17] > 1.7


def test_padding_and_company_do_not_matter(release):
    config, params, ids, lengths, _ = release
    batch = hidden_states(config, params, ids, lengths, TAPS)
    garbage = np.where(np.arange(14) < lengths[:, None], ids, 77)
    np.testing.assert_array_equal(
        real(hidden_states(config, params, garbage, lengths, TAPS), lengths), real(batch, lengths)
    )
    alone = hidden_states(config, params, ids[1:, : lengths[1]], lengths[1:], TAPS)
    assert relative_error(alone[:, 0], np.asarray(batch)[:, 1, : lengths[1]]) < 1e-5


def test_early_exit_and_shared_beginning(release):
    """Fewer layers change no tap, and a beginning kept as keys and values gives what the whole sequence gives."""
    config, params, ids, lengths, io = release
    early = hidden_states(config, params, ids, lengths, (0, 2))
    assert relative_error(real(early[1], lengths), real(io["hidden_states.2"], lengths)) <= 5e-6
    past = jax.jit(gpt_oss.prefill, static_argnums=(0, 3))(config, params, ids[0, :6], 5)
    assert past[0].shape == (5, 1, 6, 2, 16)
    # Both rows: the second is the first one cut short.
    rest, n = np.stack([ids[0, 6:], ids[0, 6:]]), np.array([8, 3], np.int32)
    rest = hidden_states(config, params, rest, n, (1, 4), past)
    whole = real(io["hidden_states.4"][:1], [14])[6:]
    assert relative_error(rest[1, 0], whole) < 1e-5
    assert relative_error(rest[1, 1, :3], whole[:3]) < 1e-5


def test_attention_sees_its_window_and_the_sink():
    """Against a loop over queries that takes exactly the keys i - window < j <= i."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 11, heads, 8), np.float32) for heads in (4, 2, 2))
    sinks = rng.standard_normal(4).astype(np.float32)
    for window in (1, 4, 99):
        distance = np.arange(11)[:, None] - np.arange(11)
        actual = gpt_oss.attend(q, k, v, jnp.array((distance >= 0) & (distance < window))[None], sinks)
        for i in range(11):
            seen = slice(max(0, i - window + 1), i + 1)
            for head in range(4):
                scores = k[0, seen, head // 2] @ q[0, i, head] / np.sqrt(8)
                weights = np.exp(scores) / (np.exp(scores).sum() + np.exp(sinks[head]))
                np.testing.assert_allclose(actual[0, i, head], weights @ v[0, seen, head // 2], rtol=2e-5, atol=1e-6)


def test_mxfp4_is_the_table():
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    table += [-x for x in table]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 2, 16), np.uint8)
    blocks[0, 0] = np.arange(16) * 17
    scales = np.array([[127, 120], [1, 252], [64, 200]], np.uint8)
    expected = np.zeros((3, 64), np.float32)
    for row in range(3):
        for i in range(64):
            byte = int(blocks[row, i // 32, i % 32 // 2])
            code = byte >> 4 if i % 2 else byte & 15
            expected[row, i] = np.ldexp(np.float32(table[code]), int(scales[row, i // 32]) - 127)
    np.testing.assert_array_equal(mxfp4.dequantise(blocks[:1], scales[:1]), expected[:1])
    half = mxfp4.dequantise(blocks[:1], scales[:1], jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(half, np.float32), expected[:1])
    # At the ends of the range XLA on a CPU flushes what is below 2^-126.
    exact = np.abs(expected) >= 2.0**-126
    np.testing.assert_array_equal(np.asarray(mxfp4.dequantise(blocks, scales))[exact], expected[exact])
    x = rng.standard_normal((5, 64), np.float32)
    product = mxfp4.matmul(x, mxfp4.unpack(blocks[:1], scales[:1], jnp.float32))
    np.testing.assert_allclose(product, x @ expected[:1].T, rtol=1e-4, atol=1e-5)


def test_experts_against_a_loop(release):
    """Every token through its own experts, one at a time in float64."""
    config, params, *_ = release
    rng = np.random.default_rng(0)
    # 40 tokens exceed several batch sizes; values reach the clamp at 7.
    x = 30 * rng.standard_normal((40, config.width)).astype(np.float32)
    valid = np.arange(40) % 5 != 0
    actual = jax.jit(functools.partial(moe.mixture, config))(params["layers"], jnp.int32(3), x, valid)
    experts = jax.tree.map(lambda leaf: np.asarray(leaf[3], np.float64), params["layers"]["experts"])
    router = jax.tree.map(lambda leaf: np.asarray(leaf[3], np.float64), params["layers"]["router"])
    up_down = [
        np.asarray(mxfp4.dequantise(*(params["layers"]["experts"][n][p][3] for p in ("blocks", "scales"))), np.float64)
        for n in ("gate_up", "down")
    ]
    clamped = 0
    for token in np.flatnonzero(valid):
        scores = x[token] @ router["kernel"] + router["bias"]
        chosen = np.argsort(-scores)[: config.experts_per_token]
        weights = np.exp(scores[chosen] - scores[chosen].max())
        expected = 0
        for e, weight in zip(chosen, weights / weights.sum()):
            gate_up = up_down[0][e] @ x[token] + experts["gate_up"]["bias"][e]
            gate, up = np.minimum(gate_up[0::2], 7), np.clip(gate_up[1::2], -7, 7)
            clamped += (gate == 7).sum()
            hidden = (up + 1) * gate / (1 + np.exp(np.minimum(-1.702 * gate, 700)))
            expected = expected + weight * (up_down[1][e] @ hidden + experts["down"]["bias"][e])
        assert relative_error(actual[token], expected) < 1e-5
    assert clamped
    assert not np.asarray(actual)[~valid].any()


def test_gathered_experts_are_those_in_turn(release):
    """The way of a decoding step on a GPU, here on a CPU; packed and dense experts, one row idle."""
    config, params, _, _, _ = release
    x = np.random.default_rng(0).standard_normal((8, config.width), np.float32)
    valid = np.arange(8) != 5
    for packed in (True, False):
        config, layers = dataclasses.replace(config, packed=packed), params["layers"]
        if not packed:
            dense = lambda p: {
                "kernel": np.swapaxes(mxfp4.dequantise(p["blocks"], p["scales"]), -1, -2),
                "bias": p["bias"],
            }
            layers = {**layers, "experts": {name: dense(p) for name, p in layers["experts"].items()}}
        router = layers["router"]
        scores = x @ np.asarray(router["kernel"][3]) + np.asarray(router["bias"][3])
        top, chosen = jax.lax.top_k(scores, config.experts_per_token)
        how = jnp.int32(3), jnp.asarray(x), valid, jnp.where(valid[:, None], jax.nn.softmax(top), 0), chosen
        gathered, in_turn = (
            jax.jit(functools.partial(way, config, layers["experts"]))(*how)
            for way in (moe.gathered_experts, moe.experts_in_turn)
        )
        assert relative_error(gathered, in_turn) < 5e-7
        assert not np.asarray(gathered)[5].any()
        assert relative_error(moe.mixture(config, layers, *how[:3])[valid], in_turn[valid]) < 5e-7


def test_generate_equals_no_cache(release):
    """Temperature 0 is the likeliest token of a run over everything so far; rows of different lengths do not mix."""
    config, params, ids, lengths, _ = release
    options = {"max_new_tokens": 10, "temperature": 0, "pad_token": 500}
    tokens, counts = generate(config, params, ids, lengths, jax.random.key(0), **options)
    assert counts.tolist() == [10, 10]
    texts = [list(row[:n]) for row, n in zip(ids, lengths)]
    for step in range(10):
        padded = np.array([text + [0] * (24 - len(text)) for text in texts], np.int32)
        scores = logits(config, params, padded, lengths + step)
        for text, row in zip(texts, np.asarray(scores)):
            text.append(int(row[len(text) - 1].argmax()))
    assert [text[-10:] for text in texts] == tokens.tolist()

    # A stop token ends its row and is the last to count; the other row goes on.
    stopped, counts = generate(
        config, params, ids, lengths, jax.random.key(0), stop_tokens=(int(tokens[0, 3]), 2), **options
    )
    assert counts.tolist() == [4, 10]
    assert stopped[0].tolist() == [*tokens[0, :4], *[500] * 6]
    assert stopped[1].tolist() == tokens[1].tolist()

    draw = lambda seed, t: generate(config, params, ids, lengths, jax.random.key(seed), **{**options, "temperature": t})
    warm = draw(1, 3.0)[0]
    np.testing.assert_array_equal(warm, draw(1, 3.0)[0])
    assert (warm != draw(2, 3.0)[0]).any()
    np.testing.assert_array_equal(draw(1, 1e-5)[0], tokens)


def test_generate_behind_a_shared_beginning(release):
    """The tokens are those of whole prompts; a row's draws are its number's, whatever is beside it; idle rows are."""
    config, params, ids, lengths, _ = release
    options = {"max_new_tokens": 8, "temperature": 2.0, "pad_token": 500}
    key, shared, own = jax.random.key(3), 5, lengths - 5
    whole = np.concatenate([np.repeat(ids[:1, :shared], 2, 0), ids[:, shared:]], 1)
    expected, _ = generate(config, params, whole, lengths, key, **options)
    past = jax.jit(gpt_oss.prefill, static_argnums=0)(config, params, whole[0, :shared])
    tokens, _ = generate(config, params, whole[:, shared:], own, key, past=past, **options)
    np.testing.assert_array_equal(tokens, expected)

    alone, counts = generate(
        config, params, np.stack([whole[1, shared:], whole[0, shared:]]), np.array([own[1], 0]), key, past=past,
        rows=(1, 0), **options,
    )  # fmt: skip
    np.testing.assert_array_equal(alone[0], expected[1])
    assert counts.tolist() == [8, 0]
    assert set(alone[1].tolist()) == {500}
    half = tuple(part[:2] for part in past)
    with pytest.raises(LensError, match=r"is of 2 layers; text needs all 6"):
        generate(config, params, ids, lengths, key, past=half, max_new_tokens=1)


def test_generate_is_led_to_an_answer(release):
    """The header is put in when it is due, once; a row that has written it is left alone; the answer has a limit."""
    config, params, ids, lengths, _ = release
    free, _ = generate(config, params, ids, lengths, jax.random.key(0), max_new_tokens=14, temperature=0)
    opening = Opening(header=(7, 8), forced=(9, 7, 8), before=4, limit=5)
    led, counts = generate(
        config,
        params,
        ids,
        lengths,
        jax.random.key(0),
        max_new_tokens=14,
        temperature=0,
        pad_token=500,
        opening=opening,
    )
    assert led[:, :4].tolist() == free[:, :4].tolist()
    assert led[:, 4:7].tolist() == [[9, 7, 8]] * 2
    assert counts.tolist() == [12, 12]
    assert (led[:, 12:] == 500).all()
    # The answer is what follows what was put in.
    longer = np.pad(ids, ((0, 0), (0, 7)))
    for row, n in enumerate(lengths):
        longer[row, n : n + 7] = led[row, :7]
    after, _ = generate(config, params, longer, lengths + 7, jax.random.key(0), max_new_tokens=5, temperature=0)
    np.testing.assert_array_equal(after, led[:, 7:12])

    # What the first row writes by itself is its header: nothing is put in there.
    itself = tuple(free[0, 1:3].tolist())
    opening = Opening(header=itself, forced=(9, *itself), before=6, limit=4)
    led, counts = generate(
        config, params, ids, lengths, jax.random.key(0), max_new_tokens=13, temperature=0, opening=opening
    )
    assert led[0, :7].tolist() == free[0, :7].tolist()
    assert counts[0] == 3 + 4
    for bad in ({"forced": (7, 8, 9)}, {"before": 0}, {"limit": 50}):
        broken = Opening((7, 8), (9, 7, 8), 4, 5)._replace(**bad)
        with pytest.raises(LensError, match="answer"):
            generate(config, params, ids, lengths, jax.random.key(0), max_new_tokens=14, opening=broken)


def test_bfloat16_stays_near(release):
    """Activations of 8 bits: 0.4 % a rounding, some thirty of them to the last layer."""
    config, params, ids, lengths, io = release
    half = hidden_states(dataclasses.replace(config, dtype="bfloat16"), params, ids, lengths, TAPS)
    assert half.dtype == jnp.bfloat16
    for layer, tap in zip(half, TAPS):
        assert 1e-4 < relative_error(real(layer, lengths), real(io[f"hidden_states.{tap}"], lengths)) < 5e-2


def test_bad_input_says_what_would_do(release):
    config, params, ids, lengths, _ = release
    for taps in ((), (2, 2), (6,), (-1, 2)):
        with pytest.raises(LensError, match=r"must be different and lie in 0..5"):
            gpt_oss.hidden_states(config, params, ids, lengths, taps)
    features = {name: value for name, value in params.items() if name not in ("norm", "unembed")}
    with pytest.raises(LensError, match="no vocabulary head"):
        gpt_oss.logits(config, features, ids, lengths)
    for bad in ({"max_new_tokens": 0}, {"max_new_tokens": 1, "temperature": float("nan")}):
        with pytest.raises(LensError, match="max_new_tokens"):
            generate(config, params, ids, lengths, jax.random.key(0), **bad)
    with pytest.raises(LensError, match=r"must lie in 0..14"):
        generate(config, params, ids, np.array([0, 15]), jax.random.key(0), max_new_tokens=1)
    for bad in ({"heads": 7}, {"width": 100}, {"dtype": "float16"}, {"experts": 2}, {"window": 0}):
        with pytest.raises(LensError, match=f"text.{next(iter(bad))}|exceeds text.experts"):
            dataclasses.replace(GptOssConfig(), **bad)
