"""The table of the text encoder: round trip, coverage of the release, and both generations of its config."""

import copy
import json

import ml_dtypes
import numpy as np
import pytest

from lens_jax.convert import gpt_oss, table
from lens_jax.convert.folder import open_component
from lens_jax.errors import LensError
from lens_jax.models.gpt_oss import GPT_OSS_20B


@pytest.fixture(scope="module")
def folder(goldens):
    return goldens / "tiny_release" / "text_encoder"


@pytest.fixture
def values(folder):
    return json.loads((folder / "config.json").read_text())


def test_round_trip_is_bit_identical(folder):
    config = gpt_oss.read_config(folder / "config.json")
    tensors = open_component(folder)
    written = gpt_oss.to_release(config, gpt_oss.from_release(config, tensors, str(folder)))
    assert set(written) == set(tensors)
    assert len(tensors) == 6 * 19 + 3
    for name in tensors:
        assert written[name].dtype == tensors[name].dtype, name
        np.testing.assert_array_equal(written[name], tensors[name])


def test_every_tensor_of_the_release_is_covered(goldens):
    dtypes = {"BF16": np.dtype(ml_dtypes.bfloat16), "U8": np.dtype(np.uint8)}
    lines = (goldens / "release_tensors.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line.startswith("text_encoder\t")]
    specs = {name: table.Spec(dtypes[dtype], tuple(json.loads(shape))) for _, name, dtype, shape in rows}
    assert len(specs) == 459
    rules = gpt_oss.rules(GPT_OSS_20B)
    assert len(rules) == 459
    table.check(rules, specs, "release_tensors.tsv")


def test_features_alone_leave_out_the_head(folder):
    config = gpt_oss.read_config(folder / "config.json")
    params = gpt_oss.from_release(config, open_component(folder), str(folder), head=False)
    assert set(params) == {"embed", "layers"}
    with pytest.raises(LensError, match="unembed was not loaded"):
        gpt_oss.to_release(config, params)


def test_misfits_are_listed_together(folder):
    config = gpt_oss.read_config(folder / "config.json")
    tensors = {name: array for name, array in open_component(folder).items() if name != "model.norm.weight"}
    tensors["model.norm.wait"] = np.zeros(64, np.float32)
    key = "model.layers.3.mlp.experts.down_proj_scales"
    tensors[key] = tensors[key].astype(np.float32)
    with pytest.raises(
        LensError, match=r"3 of 117 tensors.*down_proj_scales is float32, accepted: uint8.*did you mean"
    ):
        gpt_oss.from_release(config, tensors, "folder")


def test_both_generations_of_the_config(values):
    new = gpt_oss.config_from_release(values, "config.json")
    assert (new.rope_theta, new.rope_factor, new.rope_truncate) == (150_000, 32, False)
    assert (new.param_dtype, new.window, new.experts_per_token) == ("float32", 4, 2)
    both = gpt_oss.with_v4_rope(values)
    assert both["rope_parameters"] == values["rope_parameters"]
    assert gpt_oss.config_from_release(both, "config.json") == new
    old = {key: value for key, value in both.items() if key != "rope_parameters"}
    assert gpt_oss.config_from_release(old, "config.json") == new
    assert gpt_oss.config_from_release(gpt_oss.with_v4_rope(old), "config.json") == new
    # Without the key, transformers truncates.
    del old["rope_scaling"]["truncate"]
    assert gpt_oss.config_from_release(old, "config.json").rope_truncate


def test_the_released_config(values):
    released = values | {
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
        "experts_per_token": 4, "sliding_window": 128, "vocab_size": 201088, "dtype": "bfloat16",
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    }  # fmt: skip
    assert gpt_oss.config_from_release(released, "config.json") == GPT_OSS_20B


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": None}, "without YaRN"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, "accepted: 'yarn'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 32}}, "rope_theta is missing"),
        ({"rope_parameters.mscale": 1}, "mscale' is unknown"),
        ({"rope_parameters.attention_factor": 1.0}, r"accepted: 1\.3465"),
        ({"rope_parameters.truncate": "no"}, "truncate is 'no'"),
        ({"rope_theta": 10_000}, "contradicts rope_parameters.rope_theta"),
        ({"rope_scaling": {"rope_type": "yarn"}, "rope_theta": 150_000}, "factor is missing"),
        ({"quantization_config": {"quant_method": "fp8"}}, "must be 'mxfp4'"),
        ({"model_type": "llama"}, "accepted: 'gpt_oss'"),
        ({"hidden_act": "gelu"}, "accepted: 'silu'"),
        ({"tie_word_embeddings": True}, "accepted: False"),
        ({"layer_types": ["full_attention"] * 6}, "alternate"),
        ({"experts_per_token": 3}, "contradicts num_experts_per_tok 2"),
        ({"num_experts_per_tok": 9}, "exceeds text.experts 4"),
        ({"num_hidden_layers": 10**9}, "from 1 to 1024"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"vocab_size": "512"}, r"vocab_size is '?512'?; accepted: a whole number"),
        ({"sliding_window": None}, "sliding_window is None"),
        ({"swiglu_limit": float("nan")}, "swiglu_limit is nan"),
        ({"dtype": "float8"}, "accepted: float32, bfloat16"),
    ],
)
def test_unknown_or_contradictory_values_are_named(values, changes, message):
    values = copy.deepcopy(values)
    for key, value in changes.items():
        if "." in key:
            values[key.split(".")[0]][key.split(".")[1]] = value
        else:
            values[key] = value
    with pytest.raises(LensError, match=message):
        gpt_oss.config_from_release(values, "config.json")
