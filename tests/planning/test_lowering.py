"""Every config that comes with the package lowers for GPUs and TPUs on 1 to 1,024 devices, without memory."""

import dataclasses

import jax
import numpy as np
import pytest

from lens_jax import config as config_files
from lens_jax import parallel
from lens_jax.data.mixture import Shape
from lens_jax.models.lora import LoraConfig
from lens_jax.parallel import MeshConfig
from lens_jax.planning import estimate, lowering
from lens_jax.planning.data import data_use, largest_shapes
from lens_jax.pretraining import features
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.features import Features
from lens_jax.pretraining.recipe import abstract_state

DEVICES = (1, 8, 64, 256, 1024)


def on_devices(name: str, devices: int) -> TrainConfig:
    """A config with a mesh and batches for so many devices, and the quickstart's sizes, which its data set has."""
    config = config_files.load(name, TrainConfig)
    if config.mesh.fsdp == -1 or devices % config.mesh.fsdp:
        config = dataclasses.replace(config, mesh=MeshConfig(data=-1, fsdp=min(devices, 8)))
    data, fsdp, *_ = config.mesh.sizes(devices)
    fit = lambda size: -(-size // (data * fsdp)) * data * fsdp
    batches = {"batch_size": fit(config.data.batch_size), "batch_sizes": tuple(map(fit, config.data.batch_sizes))}
    buckets = config.data.buckets or ("48x48", "56x40", "40x56")
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, path="nowhere", buckets=buckets, **batches)
    )


@pytest.mark.parametrize(
    "devices", [pytest.param(n, marks=() if n in (8, 1024) else pytest.mark.slow) for n in DEVICES]
)
@pytest.mark.parametrize(
    "name", [name for name in config_files.available() if not name.startswith(("rl_", "distill_", "data_"))]
)
def test_step_lowers(name, devices):
    """The step that the loop compiles, one area for each number of devices in turn; with the platform's kernel."""
    config = on_devices(name, devices)
    mesh = lowering.abstract_mesh(config.mesh, devices)
    data = data_use(config, 1)
    estimate.check_shapes(config, data, mesh)
    shapes = largest_shapes(data.buckets)
    use = shapes[DEVICES.index(devices) % len(shapes)]
    state = abstract_state(config, mesh, config.offload and mesh is not None)
    half = config.model.dtype == "bfloat16"
    for platform, kernel in (("cuda", "cudnn" if half else "xla"), ("tpu", "splash")):
        traced = lowering.trace(lowering.on_platform(config, platform), mesh, state, use.images, use.tokens)
        step = "train step" if config.accumulation == 1 else "micro-step"
        assert lowering.lower(step, traced[step], mesh, platform).kernel == kernel
        assert ("update" in traced) == (config.accumulation > 1)


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=2, sequence=2)], ids=["fsdp", "all"])
def test_an_adapters_step_lowers(mesh):
    """Of the released size, with dropout and in every layer, and with it what is held throughout."""
    config = dataclasses.replace(on_devices("finetune", 8), mesh=mesh, init_from="a release")
    device = lowering.abstract_mesh(mesh, 8)
    use = largest_shapes(data_use(config, mesh.sequence).buckets)[0]
    everywhere = dataclasses.replace(config, lora=LoraConfig(rank=64, targets=("*",), dropout=0.1))
    state = abstract_state(everywhere, device, offload=False)
    traced = lowering.trace(lowering.on_platform(everywhere, "cuda"), device, state, use.images, use.tokens)
    assert lowering.lower("train step", traced["train step"], device, "cuda").kernel == "cudnn"
    adapted = dataclasses.replace(config, lora=LoraConfig(rank=64, targets=("attention", "mlp")))
    held = estimate.resident(adapted, device, [use], cached=True)
    # 4.1B in bfloat16, over `fsdp` and, but for the third that is modulation, `tensor`; of 160.4M in float32 a part.
    share = 1 / 8 if mesh.fsdp == 8 else 1 / 3 / 2 + 2 / 3 / 4
    assert 8.2e9 * share < held["frozen parameters"] < 8.3e9 * share
    assert held["parameters"] == held["average"] < 4 * 160_432_128
    assert held["optimiser"] == pytest.approx(2 * held["parameters"], rel=1e-4)


def test_nothing_is_left_behind():
    """cuDNN is unknown again to a machine without a GPU, and AbstractMesh is unset."""
    x = jax.numpy.zeros((1, 128, 2, 64), "bfloat16")
    with pytest.raises(RuntimeError, match="cuDNN is not detected"):
        jax.nn.dot_product_attention(x, x, x, implementation="cudnn")
    assert jax.sharding.get_abstract_mesh().empty


@pytest.mark.parametrize("pad_areas", [False, True])
def test_batch_without_a_batch(tiny_config, pad_areas):
    """Shapes and dtypes are those that a run's features give."""
    config = dataclasses.replace(tiny_config, data=dataclasses.replace(tiny_config.data, pad_areas=pad_areas))
    buckets = data_use(config, 1).buckets
    run = Features(config, [Shape(use.bucket, use.text_class) for use in buckets])
    use = buckets[0]
    pixels = np.zeros((use.images, use.bucket.height, use.bucket.width, 3), np.uint8)
    captions = ["red apple"] * use.images
    size = use.bucket.height, use.bucket.width
    batch = run.read({"pixels": pixels, "captions": captions, "bucket": size, "text_class": 0, "step": 3})
    found = run.encode(
        {"basis": np.eye(48, dtype=np.float32), "mean": np.zeros(48, np.float32), "scale": np.ones(1, np.float32)},
        batch,
    )
    kind = lambda x: (np.shape(x), np.asarray(x).dtype)
    expected = features.abstract_batch(config, use.images, use.tokens)
    assert jax.tree.map(kind, found) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    assert parallel.abstract_array("text_lengths", (4,), "int32", None).sharding is None
