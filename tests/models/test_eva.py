"""EVA-02 against timm's own answers, and properties that must hold at any size."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lens_jax.convert import eva as convert_eva
from lens_jax.convert import table
from lens_jax.convert.folder import open_component
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.errors import LensError
from lens_jax.models import eva
from lens_jax.models.eva import EvaConfig


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def golden(goldens):
    """Config, parameters, and timm's answers of a small network (`tests/oracle/test_eva.py` made them)."""
    folder = goldens / "tiny_eva"
    config = convert_eva.read_config(folder / "config.json", dtype="float32")
    lazy = convert_eva.leaves(config, open_component(folder / "model.safetensors"), "golden")
    return config, traverse_util.unflatten_dict(dict(lazy), sep="/"), SafetensorsFile(folder / "io.safetensors")


def test_logits_are_timms(golden):
    config, params, answers = golden
    pixels = answers["prepared"].transpose(0, 2, 3, 1)
    logits = jax.jit(functools.partial(eva.apply, config))(params, pixels)
    assert logits.dtype == jnp.float32
    # Another order of summation: 5e-7 was seen.
    assert relative_error(logits, answers["logits"]) <= 5e-6
    # The answers are of this input and of each part of the network: without the class token, with positions in steps of
    # the fine grid, or with rows for columns they are others, by 1 % and more.
    turned = jax.jit(functools.partial(eva.apply, config))(params, pixels.transpose(0, 2, 1, 3))
    coarse = jax.jit(functools.partial(eva.apply, dataclasses.replace(config, rope_grid=config.grid)))(params, pixels)
    alone = jax.jit(functools.partial(eva.apply, config))({**params, "class_token": 0 * params["class_token"]}, pixels)
    for other in (turned, coarse, alone):
        assert relative_error(other, answers["logits"]) > 1e-2


def test_bfloat16_is_near(golden):
    config, params, answers = golden
    half = dataclasses.replace(config, dtype="bfloat16")
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    logits = jax.jit(functools.partial(eva.apply, half))(params, answers["prepared"].transpose(0, 2, 3, 1))
    # bfloat16 rounds to 0.4 %, some ten times on the way.
    assert 1e-4 < relative_error(logits, answers["logits"]) <= 3e-2


def test_released_size():
    config = EvaConfig()
    assert eva.parameter_count(config) == 86_351_620
    assert (config.grid, config.tokens, config.head_dim) == (32, 1025, 64)
    assert len(convert_eva.rules(config)) == 236
    # Rows and columns of 32 x 32 patches are counted in halves, so that the last is 15.5.
    assert eva.grid_positions(config)[[0, 1, 2, -1]].tolist() == [[0, 0], [0, 0], [0, 0.5], [15.5, 15.5]]


def test_table_goes_both_ways(golden, goldens):
    """Every number of the file is in one place of the tree, and comes back from there."""
    config, params, _ = golden
    tensors = SafetensorsFile(goldens / "tiny_eva" / "model.safetensors")
    back = table.to_release(convert_eva.rules(config), traverse_util.flatten_dict(params, sep="/"))
    assert set(back) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(back[name], array)
    assert sum(array.size for array in tensors.values()) == eva.parameter_count(config)


def test_released_config_is_read():
    values = {"architecture": convert_eva.ARCHITECTURE, "num_classes": 4, "num_features": 768, "global_pool": "avg"}
    assert convert_eva.config_from_release(values, "config.json") == EvaConfig()
    sizes = {"img_size": [224, 224], "depth": 3, "ref_feat_shape": 8, "mlp_ratio": 2}
    values["model_args"] = {**sizes, "num_classes": 4, "in_chans": 3, "global_pool": "avg"}
    expected = EvaConfig(image=224, layers=3, rope_grid=8, hidden=1536)
    assert convert_eva.config_from_release(json.loads(json.dumps(values)), "config.json") == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": 450}, "multiple of eva.patch 14"),
        ({"width": 770}, "multiple of 4 eva.heads, 48"),
        ({"layers": 0}, "eva.layers is 0"),
        ({"dtype": "float16"}, "accepted: float32, bfloat16"),
    ],
)
def test_sizes_that_do_not_fit(change, said):
    with pytest.raises(LensError, match=said):
        EvaConfig(**change)


def test_pixels_of_another_size():
    config = EvaConfig()
    with pytest.raises(LensError, match=r"accepted: \[B, 448, 448, 3\]"):
        eva.apply(config, eva.abstract_params(config), jnp.zeros((1, 224, 224, 3)))
