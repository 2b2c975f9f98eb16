"""Meshes of simulated devices give what one device gives; bad meshes and parameters without a rule are told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lens_jax import sharding
from lens_jax.errors import LensError
from lens_jax.models import autoencoder, denoiser, gpt_oss
from lens_jax.models.autoencoder import AutoencoderConfig
from lens_jax.models.denoiser import LENS
from lens_jax.models.gpt_oss import GPT_OSS_20B
from lens_jax.sharding import AUTOENCODER_RULES, AXES, DENOISER_RULES, GPT_OSS_RULES, MeshConfig

# data, fsdp, tensor, sequence -> collectives in the compiled step on a CPU, which has no reduce-scatter. More of them
# than here means that something is laid out by accident; data parallelism alone must gather nothing.
MESHES = {
    "8,1,1,1": {"all-gather": 0, "all-reduce": 3, "all-to-all": 0},
    "1,8,1,1": {"all-gather": 16, "all-reduce": 10, "all-to-all": 0},
    "2,2,2,1": {"all-gather": 16, "all-reduce": 18, "all-to-all": 0},
    "1,4,2,1": {"all-gather": 16, "all-reduce": 19, "all-to-all": 0},
    "1,2,2,2": {"all-gather": 16, "all-reduce": 21, "all-to-all": 16},
}


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    script = Path(__file__).with_name("simulated_devices.py")
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(script), *MESHES], capture_output=True, text=True, check=False, env=environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {",".join(map(str, line["mesh"])): line for line in lines}


@pytest.mark.parametrize("mesh", MESHES)
def test_five_steps_are_those_of_one_device(results, mesh):
    """Sums in another order: 6e-6 of a parameter after five steps of Adam, which divides by the gradient's size."""
    assert results[mesh]["losses"] <= 1e-6
    assert results[mesh]["norms"] <= 1e-5
    assert results[mesh]["params"] <= 1e-5


@pytest.mark.parametrize("mesh", MESHES)
def test_collectives_are_pinned(results, mesh):
    found = results[mesh]["collectives"]
    assert {name: found[name] for name in MESHES[mesh]} == MESHES[mesh]
    assert found["collective-permute"] == 0


def abstract_mesh(**sizes: int):
    return jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def test_every_parameter_has_a_rule():
    """Of all three networks at full size, on a mesh that cuts every axis."""
    mesh = abstract_mesh(data=2, fsdp=8, tensor=4, sequence=2)
    trees = {
        "denoiser": (DENOISER_RULES, denoiser.abstract_params(LENS)),
        "autoencoder": (AUTOENCODER_RULES, autoencoder.abstract_params(AutoencoderConfig())),
        "gpt_oss": (GPT_OSS_RULES, gpt_oss.abstract_params(GPT_OSS_20B)),
    }
    for rules, tree in trees.values():
        sharding.tree_specs(rules, tree, mesh)
    # What is not cut is small: the denoiser's largest whole parameters are biases.
    specs = sharding.tree_specs(DENOISER_RULES, trees["denoiser"][1], mesh)
    whole = [
        leaf.size for leaf, spec in zip(jax.tree.leaves(trees["denoiser"][1]), jax.tree.leaves(specs)) if not any(spec)
    ]
    assert max(whole) <= 48 * 9216


def test_unknown_parameter_is_an_error():
    tree = {"blocks": {"image": {"adapter": {"kernel": jax.ShapeDtypeStruct((2, 3), "float32")}}}}
    with pytest.raises(LensError, match=r"no sharding rule for the parameter blocks/image/adapter/kernel \[2, 3\]"):
        sharding.tree_specs(DENOISER_RULES, tree, abstract_mesh())


def test_bad_meshes():
    with pytest.raises(LensError, match=r"mesh.tensor is 5, which does not divide 4096 of blocks/image/down/kernel"):
        sharding.tree_specs(DENOISER_RULES, denoiser.abstract_params(LENS), abstract_mesh(tensor=5))
    with pytest.raises(LensError, match=r"mesh \(data 3, fsdp -1, tensor 1, sequence 1\) does not fit 8 devices"):
        MeshConfig(data=3).sizes(8)
    with pytest.raises(LensError, match="one axis only"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(LensError, match=r"mesh.data is 0; it must be at least 1"):
        MeshConfig(data=0)
    assert MeshConfig(tensor=2).sizes(8) == (1, 4, 2, 1)
