"""Meshes of simulated devices give what one device gives; bad meshes and parameters without a rule are told."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lens_jax import parallel
from lens_jax.errors import LensError
from lens_jax.models import autoencoder, denoiser, gpt_oss
from lens_jax.models.autoencoder import AutoencoderConfig
from lens_jax.models.denoiser import LENS
from lens_jax.models.gpt_oss import GPT_OSS_20B
from lens_jax.parallel import AUTOENCODER_RULES, AXES, DENOISER_RULES, GPT_OSS_RULES, MeshConfig
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.recipe import RULES, create_state

GOLDEN = "sharding.json"

# data, fsdp, tensor, sequence -> collectives in the compiled step on a CPU. More of them than here means that something
# is laid out by accident; data parallelism alone must gather nothing. The ten kernels of a block are gathered again in
# the backward pass rather than kept whole on every device, and so are heads exchanged for sequence.
MESHES = {
    "8,1,1,1": {"all-gather": 0, "reduce-scatter": 0, "all-reduce": 3, "all-to-all": 0},
    "1,8,1,1": {"all-gather": 26, "reduce-scatter": 16, "all-reduce": 4, "all-to-all": 0},
    "2,2,2,1": {"all-gather": 26, "reduce-scatter": 16, "all-reduce": 20, "all-to-all": 0},
    "1,4,2,1": {"all-gather": 26, "reduce-scatter": 16, "all-reduce": 13, "all-to-all": 0},
    "1,2,2,2": {"all-gather": 26, "reduce-scatter": 0, "all-reduce": 21, "all-to-all": 24},
}
if jax.__version_info__ >= (0, 12):
    # Its compiler joins sums otherwise (seen with 0.12.0.1).
    MESHES["2,2,2,1"]["all-reduce"], MESHES["1,2,2,2"]["all-reduce"] = 16, 22


def simulate(what: str, *meshes: str) -> dict[str, dict]:
    """What simulated_devices.py prints, by mesh."""
    script = Path(__file__).with_name("simulated_devices.py")
    command = [sys.executable, str(script), what, *meshes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["mesh"] for line in lines] == list(meshes)
    return {line["mesh"]: line for line in lines}


@functools.cache
def five_steps(mesh: str) -> dict:
    return simulate("steps", mesh)[mesh]


# Half a minute each: one that shards along three axes by default.
SLOW_BUT_ONE = [pytest.param(mesh, marks=() if mesh == "2,2,2,1" else pytest.mark.slow) for mesh in MESHES]


@pytest.mark.parametrize("mesh", SLOW_BUT_ONE)
def test_five_steps_are_those_of_one_device(mesh):
    """Sums in another order: 3e-6 of a parameter and of its last gradient is seen after five steps of Adam."""
    found = five_steps(mesh)
    assert found["losses"] <= 1e-6
    assert found["norms"] <= 1e-5
    assert found["gradients"] <= 1e-5
    assert found["params"] <= 1e-5


@pytest.mark.slow
def test_padded_micro_steps_equal_unpadded_ones():
    """Of the nine ratios of an area, in one program: 1e-6 of any gradient is seen, without and with a mesh."""
    for found in simulate("padding", "none", "1,4,2,1", "1,2,2,2").values():
        assert found["losses"] <= 1e-6
        assert found["gradients"] <= 1e-5
        assert found["programs"] == 1


@pytest.mark.slow
def test_splash_on_a_mesh():
    """The TPU kernel, interpreted, with sharded rows, heads and sequence: 1e-6 of any gradient is seen."""
    found = simulate("splash", "1,2,2,2")["1,2,2,2"]
    assert found["losses"] <= 1e-6
    assert found["gradients"] <= 1e-5


@pytest.mark.slow
def test_an_adapter_beside_its_base():
    """Dropout too: what is left out does not depend on the mesh. 1e-6 of a gradient is seen, 3e-6 of the adapter."""
    for found in simulate("lora", "8,1,1,1", "1,4,2,1", "1,2,2,2").values():
        assert found["losses"] <= 1e-6
        assert found["gradients"] <= 1e-5
        assert found["params"] <= 1e-5
        assert found["ema"] <= 1e-5


@pytest.mark.slow
def test_offloading_changes_nothing():
    """On a mesh; on one device tests/pretraining/test_train.py has it."""
    found = simulate("offload", "2,2,2,1")["2,2,2,1"]
    assert found["state"] <= 1e-5
    # What of the moments is a scalar stays.
    assert found["places"] == {"params": ["device"], "ema": ["pinned_host"], "moments": ["device", "pinned_host"]}
    assert found["checksums"]


def test_gradients_summed_in_float32():
    """Each device's own part is rounded all the same: 7e-4 to 9e-4 is seen, and 1.8e-3 to 2.5e-3 in bfloat16."""
    for found in simulate("sums", "8,1,1,1", "1,8,1,1", "2,2,2,1").values():
        assert found["float32"] <= 1.2e-3
        assert found["compute"] >= 1.5 * found["float32"]
    with pytest.raises(LensError, match=r"mesh\.reduce_dtype is float32, which works with mesh\.sequence 1 only"):
        MeshConfig(sequence=2, reduce_dtype="float32").sizes(8)


@pytest.mark.slow
def test_replicas_share_the_reading_of_a_checkpoint():
    """Bit for bit in the layout that was asked for, of which a replica reads its part along `data` alone."""
    found = simulate("restore", "4,2,1,1")
    assert found["4,2,1,1"]["state"] == 0
    # But for the codec's scale, a single number, which every replica reads.
    assert found["4,2,1,1"]["share"] == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize("mesh", SLOW_BUT_ONE)
def test_collectives_are_pinned(mesh):
    found = five_steps(mesh)["collectives"]
    assert {name: found[name] for name in MESHES[mesh]} == MESHES[mesh]
    assert found["collective-permute"] == 0


def abstract_mesh(**sizes: int):
    return jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def every_layout() -> dict[str, str]:
    """Path -> shape and layout of every array of three networks and of a training state, sharded along all axes."""
    mesh = abstract_mesh(data=2, fsdp=8, tensor=4, sequence=2)
    codec = {"mean": np.zeros(128, np.float32), "scale": np.ones(1, np.float32)}
    trees = {
        "denoiser": (DENOISER_RULES, denoiser.abstract_params(LENS)),
        "autoencoder": (AUTOENCODER_RULES, autoencoder.abstract_params(AutoencoderConfig())),
        "gpt_oss": (GPT_OSS_RULES, gpt_oss.abstract_params(GPT_OSS_20B)),
    }
    laid_out = {name: (tree, parallel.tree_specs(rules, tree, mesh)) for name, (rules, tree) in trees.items()}
    state = jax.eval_shape(functools.partial(create_state, TrainConfig(model=LENS)), codec)
    laid_out["state"] = state, parallel.state_specs(state, RULES, mesh)
    found = {}
    for name, (tree, specs) in laid_out.items():
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        for (path, leaf), spec in zip(leaves, jax.tree.leaves(specs)):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            axes = ", ".join(axis or "-" for axis in (*spec, *(None,) * (leaf.ndim - len(spec))))
            found[f"{name}/{where}"] = f"{list(leaf.shape)} {axes}".rstrip()
    return found


def test_every_array_is_laid_out_as_in_the_golden(goldens):
    """Written by `python tests/parallel/test_sharding.py`: read its difference before you commit it."""
    assert every_layout() == json.loads((goldens / GOLDEN).read_text())


def test_unknown_parameter_is_an_error():
    tree = {"blocks": {"image": {"adapter": {"kernel": jax.ShapeDtypeStruct((2, 3), "float32")}}}}
    with pytest.raises(LensError, match=r"no sharding rule for the parameter blocks/image/adapter/kernel \[2, 3\]"):
        parallel.tree_specs(DENOISER_RULES, tree, abstract_mesh())


def test_bad_meshes():
    with pytest.raises(LensError, match=r"mesh.tensor is 5, which does not divide 4096 of blocks/image/down/kernel"):
        parallel.tree_specs(DENOISER_RULES, denoiser.abstract_params(LENS), abstract_mesh(tensor=5))
    with pytest.raises(LensError, match=r"mesh \(data 3, fsdp -1, tensor 1, sequence 1\) does not fit 8 devices"):
        MeshConfig(data=3).sizes(8)
    with pytest.raises(LensError, match="one axis only"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(LensError, match=r"mesh.data is 0; it must be at least 1"):
        MeshConfig(data=0)
    assert MeshConfig(tensor=2).sizes(8) == (1, 4, 2, 1)


if __name__ == "__main__":
    text = json.dumps(every_layout(), indent=0) + "\n"
    (Path(__file__).parents[1] / "goldens" / GOLDEN).write_text(text, encoding="utf-8")
