"""GPT-OSS against transformers' own: every layer, logits, greedy text, YaRN, and its names."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
from transformers import GptOssConfig as TheirConfig
from transformers import GptOssForCausalLM, Mxfp4Config
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from lens_jax.convert import gpt_oss as convert
from lens_jax.convert import writer
from lens_jax.models import gpt_oss, mxfp4
from lens_jax.models.generate import generate
from lens_jax.models.gpt_oss import GPT_OSS_20B, GptOssConfig

pytestmark = pytest.mark.oracle

# An odd number of layers, three query heads a key head, an odd number of rotary frequencies: nothing as in the goldens.
MID = GptOssConfig(
    layers=7, width=96, hidden=160, heads=6, kv_heads=2, head_dim=22, experts=8, experts_per_token=3, vocab=640,
    window=5, rope_original_context=16, rope_theta=1000.0, dtype="float32", param_dtype="float32",
)  # fmt: skip
# Beyond the window many times over, beyond the original context of YaRN, and padded to the longest.
LENGTHS = np.array([37, 21, 1], np.int32)

YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096, "rope_theta": 150_000,
}  # fmt: skip


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def release_values(config: GptOssConfig, **changes) -> dict:
    """A `text_encoder/config.json` (release 1.6) of a model of this size."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "dtype": config.param_dtype,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "attention_bias": True,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "swiglu_limit": config.swiglu_limit,
        "sliding_window": config.window,
        "vocab_size": config.vocab,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "rope_parameters": YARN
        | {"rope_theta": config.rope_theta, "original_max_position_embeddings": config.rope_original_context},
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
        },
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our random parameters, and transformers' model of the folder they are written to."""
    params = gpt_oss.init(MID, jax.random.key(0))
    # Wider than usual: experts reach their clamp at 7, sinks take weight, routers choose clearly.
    wider = {"blocks": lambda x: x, "scale": lambda x: x, "scales": lambda x: x + 3}
    params = jax.tree_util.tree_map_with_path(lambda path, x: wider.get(path[-1].key, lambda x: 10 * x)(x), params)
    folder = tmp_path_factory.mktemp("text_encoder")
    writer.write_folder(folder, convert.to_release(MID, params), stem="model", max_shard_bytes=500_000)
    (folder / "config.json").write_text(json.dumps(release_values(MID)))
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, report = GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True,
        quantization_config=Mxfp4Config(dequantize=True),
    )  # fmt: skip
    assert not any(report.values()), report
    return params, model.eval()


@pytest.fixture(scope="module")
def batch():
    ids = np.random.default_rng(0).integers(3, MID.vocab, (3, LENGTHS.max())).astype(np.int32)
    return np.where(np.arange(ids.shape[1]) < LENGTHS[:, None], ids, 0)


def real(array):
    """The valid tokens of [B, T, ...] as one array."""
    return np.concatenate([np.asarray(array)[row, :n] for row, n in enumerate(LENGTHS)])


def test_every_layer_and_the_logits(pair, batch):
    params, model = pair
    outputs = []
    keep = lambda *call: outputs.append(call[-1])
    # By hooks, since the last of transformers' `hidden_states` is behind the final norm.
    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    with torch.no_grad():
        mask = torch.from_numpy(np.arange(batch.shape[1]) < LENGTHS[:, None]).long()
        scores = model(torch.from_numpy(batch).long(), attention_mask=mask).logits
    for hook in hooks:
        hook.remove()
    taps = tuple(range(MID.layers))
    tapped = jax.jit(gpt_oss.hidden_states, static_argnums=(0, 4))(MID, params, batch, LENGTHS, taps)
    for ours, theirs in zip(tapped, outputs, strict=True):
        assert relative_error(real(ours), real(theirs)) <= 2e-5
    actual = jax.jit(gpt_oss.logits, static_argnums=0)(MID, params, batch, LENGTHS)
    assert relative_error(real(actual), real(scores)) <= 2e-5


def test_greedy_text(pair, batch):
    """Token for token, each prompt alone there and all together here; then with a stop token."""
    params, model = pair

    def theirs(row, stop):
        ids = torch.from_numpy(batch[row : row + 1, : LENGTHS[row]]).long()
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=stop
        )
        return text[0, ids.shape[1] :].tolist()

    ours = functools.partial(
        generate, MID, params, batch, LENGTHS, jax.random.key(0), max_new_tokens=24, temperature=0.0
    )
    tokens, counts = ours()
    expected = [theirs(row, None) for row in range(3)]
    assert tokens.tolist() == expected
    assert counts.tolist() == [24] * 3
    assert len({token for row in expected for token in row}) > 12  # not one token over and over
    stop = expected[1][7]
    tokens, counts = ours(stop_tokens=(stop,))
    assert [list(row[:n]) for row, n in zip(tokens, counts)] == [theirs(row, stop) for row in range(3)]


@pytest.mark.parametrize("generation", [4, 5])
@pytest.mark.parametrize(
    "changes",
    [{}, {"truncate": True}, {"truncate": None}, {"factor": 4.0, "beta_fast": 20.0, "beta_slow": 2.0},
     {"original_max_position_embeddings": 64, "rope_theta": 500.0}],
    ids=str,
)  # fmt: skip
def test_yarn(generation, changes):
    """Frequencies and factor from `rope_parameters`, or from `rope_scaling` and `rope_theta`."""
    rope = {key: value for key, value in (YARN | changes).items() if value is not None}
    values = release_values(GPT_OSS_20B, rope_parameters=rope)
    if generation == 4:
        del values["rope_parameters"]
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = rope
    frequencies, factor = gpt_oss.rotary_frequencies(convert.config_from_release(values, "config.json"))
    theirs = GptOssRotaryEmbedding(TheirConfig.from_dict(values))
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)
    # They compute theirs in float32 throughout, we round once.
    np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=1e-6)


def test_our_config_for_both_generations_is_one_to_transformers():
    values = release_values(GPT_OSS_20B)
    both = convert.with_v4_rope(values)
    old = {key: value for key, value in both.items() if key != "rope_parameters"}
    frequencies = [GptOssRotaryEmbedding(TheirConfig.from_dict(v)).inv_freq for v in (values, both, old)]
    assert torch.equal(frequencies[0], frequencies[1])
    assert torch.equal(frequencies[0], frequencies[2])


def test_released_names_and_shapes():
    """The 20B model without memory: names and shapes of the table are transformers', experts in their packed form."""
    with torch.device("meta"):
        model = GptOssForCausalLM(TheirConfig.from_dict(release_values(GPT_OSS_20B)))
    expected = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape  # transposed when they are unpacked
            expected[f"{name}_blocks"] = (experts, outputs, inputs // 32, 16)
            expected[f"{name}_scales"] = (experts, outputs, inputs // 32)
        else:
            expected[name] = tuple(tensor.shape)
    assert {rule.name: rule.shape for rule in convert.rules(GPT_OSS_20B)} == expected
    assert len(expected) == 459
    assert sum(tensor.numel() for tensor in model.parameters()) == gpt_oss.parameter_count(GPT_OSS_20B)


def test_experts_are_unpacked_to_the_same_weights(pair):
    """transformers' own unpacking against ours, to the bit."""
    params, model = pair
    for name in ("gate_up", "down"):
        packed = params["layers"]["experts"][name]
        theirs = getattr(model.model.layers[3].mlp.experts, f"{name}_proj").detach().numpy()
        ours = mxfp4.dequantise(packed["blocks"][3], packed["scales"][3], jnp.float32)
        np.testing.assert_array_equal(ours.swapaxes(1, 2), theirs)
