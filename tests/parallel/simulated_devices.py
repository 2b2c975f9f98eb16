"""Run by tests in a process of its own: eight simulated devices have to be asked for before JAX starts.

python simulated_devices.py steps MESH ...     five steps on each mesh "data,fsdp,tensor,sequence"
python simulated_devices.py padding MESH ...   micro-steps of nine ratios, padded, in one program
python simulated_devices.py splash MESH ...    a micro-step whose attention is the TPU kernel, interpreted
python simulated_devices.py offload MESH ...   two steps with average and moments in the host's memory
python simulated_devices.py restore MESH ...   a checkpoint, average and moments into the host's memory
python simulated_devices.py sums MESH ...      gradients in bfloat16, summed in either dtype
python simulated_devices.py lora MESH ...      two steps of an adapter beside a frozen base, with dropout, offloaded

Each prints a JSON line for every mesh, of which "none" is one device without any: how far its numbers are, relative to
their size, from those of one device, unpadded and with XLA's attention.
"""

import dataclasses
import functools
import json
import math
import os
import sys
import tempfile

import jax

# Compiling is most of the time here, and a third shorter without LLVM's optimisations.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from etils import epath  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402

from lens_jax import parallel  # noqa: E402
from lens_jax.data.buckets import RATIOS, make_buckets  # noqa: E402
from lens_jax.diffusion.flow import FlowConfig  # noqa: E402
from lens_jax.models import attention_tpu  # noqa: E402
from lens_jax.models.denoiser import DenoiserConfig  # noqa: E402
from lens_jax.models.layers import joint_positions  # noqa: E402
from lens_jax.models.lora import LoraConfig  # noqa: E402
from lens_jax.parallel import MeshConfig  # noqa: E402
from lens_jax.pretraining.config import TrainConfig  # noqa: E402
from lens_jax.pretraining.loss import training_loss  # noqa: E402
from lens_jax.pretraining.recipe import RULES, create_state  # noqa: E402
from lens_jax.run import integrity  # noqa: E402
from lens_jax.run.config import CheckpointConfig  # noqa: E402
from lens_jax.run.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer  # noqa: E402
from lens_jax.run.state import from_parts, to_parts  # noqa: E402
from lens_jax.run.step import StepConfig, micro_step, train_step  # noqa: E402
from lens_jax.run.store import Store  # noqa: E402

MODEL = DenoiserConfig(
    layers=2, heads=8, head_dim=16, rope_axes=(4, 6, 6), latent_channels=16, text_width=24, text_layers=2,
    mlp_width=336, dtype="float32",
)  # fmt: skip
CONFIG = TrainConfig(model=MODEL, optimizer=OptimizerConfig(warmup_steps=1, learning_rate=1e-3), steps=100)
SCHEDULE = learning_rate_schedule(CONFIG.optimizer, 100)
STEP = StepConfig(ema_decay=0.99)
LOSS = functools.partial(training_loss, MODEL, FlowConfig())
# Its state keeps the last gradients as they came.
REMEMBER = optax.GradientTransformation(optax.tree.zeros_like, lambda updates, state, params: (updates, updates))
OPTIMIZER = optax.chain(REMEMBER, make_optimizer(CONFIG.optimizer, 100))
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
TEXT = 8


def batch(rows: int = 4, columns: int = 4, padded: int = 0) -> dict:
    """Eight images of rows x columns latent tokens, and eight text tokens, of which an image has one to eight.

    With `padded`, latents are padded to that many tokens; the values of the others do not depend on it.
    """
    rng = np.random.default_rng(rows)
    tokens = rows * columns
    latents = rng.standard_normal((8, tokens, 16), np.float32)
    positions = joint_positions(rows, columns, TEXT)
    made = {
        "latents": latents,
        "text": tuple(rng.standard_normal((8, TEXT, 24), np.float32) for _ in range(2)),
        "text_lengths": np.arange(1, 9, dtype=np.int32),
        "positions": positions,
    }
    if padded:
        room = padded - tokens
        made["latents"] = np.pad(latents, ((0, 0), (0, room), (0, 0)))
        made["positions"] = np.insert(positions, [tokens] * room, 0, axis=0)
        made["n_image"] = np.int32(tokens)
    return made


def new_state(mesh, trained: bool = False, optimizer=OPTIMIZER, offload: bool = False):
    """A fresh state; `trained` moves it away from where most gradients are zero."""

    def create(codec):
        state = create_state(CONFIG, codec)
        state = state.replace(opt_state=optimizer.init(state.params))
        if not trained:
            return state
        leaves, tree = jax.tree.flatten(state.params)
        keys = jax.random.split(jax.random.key(7), len(leaves))
        moved = [x + 0.05 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)]
        return state.replace(params=jax.tree.unflatten(tree, moved))

    codec = {"mean": np.zeros(16, np.float32), "scale": np.ones(1, np.float32)}
    return parallel.create(create, RULES, mesh, codec, offload=offload)


def micro_step_on(mesh, loss=LOSS):
    """(a function of (state, batch of this process) to (loss, gradients), the compiled function in it)."""
    compiled = jax.jit(functools.partial(micro_step, STEP, loss))

    def run(state, made: dict):
        totals = parallel.on(mesh, compiled)(state, None, parallel.place_batch(made, mesh), 0)
        return jax.device_get((totals.loss, totals.gradients))

    return run, compiled


def steps(mesh, reference: bool = False) -> dict:
    """Of five steps the losses, gradient norms, last gradients, parameters; the collectives of the compiled step."""
    state = new_state(mesh)
    inputs = parallel.place_batch(batch(), mesh)
    step = jax.jit(functools.partial(train_step, STEP, LOSS, OPTIMIZER, SCHEDULE), donate_argnums=0)
    program = parallel.on(mesh, lambda *args: step.lower(*args).compile())(state, inputs)
    text = program.as_text()
    losses, norms = [], []
    for _ in range(5):
        state, metrics = program(state, inputs)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["gradient_norm"]))
    return {
        "losses": np.array(losses),
        "norms": np.array(norms),
        "gradients": jax.device_get(state.opt_state[0]),
        "params": jax.device_get(state.params),
        "collectives": {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in COLLECTIVES},
    }


def padding(mesh, reference: bool = False) -> dict:
    """Losses and gradients of nine ratios, padded unless `reference`, and the programs compiled for them."""
    buckets = make_buckets(7, RATIOS, 1)
    padded = 0 if reference else max(bucket.tokens(1) for bucket in buckets)
    run, compiled = micro_step_on(mesh)
    state = new_state(mesh, trained=True)
    losses, gradients = zip(*(run(state, batch(bucket.height, bucket.width, padded)) for bucket in buckets))
    return {"losses": np.array(losses), "gradients": gradients, "programs": compiled._cache_size()}


def splash(mesh, reference: bool = False) -> dict:
    """Loss and gradients of a micro-step; except for the reference, its attention is splash's."""
    attention_tpu.splash = functools.partial(attention_tpu.splash, interpret=True)
    kernel = "xla" if reference else "splash"
    loss = functools.partial(training_loss, dataclasses.replace(MODEL, attention=kernel), FlowConfig())
    loss, gradients = micro_step_on(mesh, loss)[0](new_state(mesh, trained=True), batch(padded=18))
    return {"losses": loss, "gradients": gradients}


def offload(mesh, reference: bool = False) -> dict:
    """The state after two steps, offloaded unless `reference`, and the kinds of memory that its parts are in."""
    offloaded = not reference
    config = dataclasses.replace(STEP, offload=offloaded)
    # Without gradients among the moments: jax 0.10.2 aborts where a result on the host has no argument to replace.
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1), 100)
    step = functools.partial(train_step, config, LOSS, optimizer, SCHEDULE)
    run = parallel.on(mesh, jax.jit(step, donate_argnums=0))
    state, inputs = new_state(mesh, optimizer=optimizer, offload=offloaded), parallel.place_batch(batch(), mesh)
    for _ in range(2):
        state, _ = run(state, inputs)
    trees = {"params": state.params, "ema": state.ema, "moments": state.opt_state}
    places = {name: sorted({x.sharding.memory_kind for x in jax.tree.leaves(tree)}) for name, tree in trees.items()}
    sums = integrity.checksums(state.ema, mesh) == integrity.checksums(parallel.on_device(state.ema, mesh), mesh)
    return {"state": jax.device_get(trees), "places": places, "checksums": sums}


def sums(mesh, reference: bool = False) -> dict:
    """Gradients of a bfloat16 product with a gathered weight, by what they are summed in; exact on one device."""
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((64, 32), np.float32), "bias": np.zeros(32, np.float32)}
    batch = {
        name: 1 + rng.standard_normal((64, width), np.float32) for name, width in (("inputs", 64), ("targets", 32))
    }
    specs = {"kernel": PartitionSpec("fsdp"), "bias": PartitionSpec()}
    if mesh is not None:
        specs = specs if mesh.shape["fsdp"] > 1 else dict.fromkeys(specs, PartitionSpec())
        params = jax.device_put(params, parallel.shardings(mesh, specs))
    batch = parallel.place_batch(batch, mesh)
    dtype = "float32" if reference else "bfloat16"

    def loss(params, batch, reduce_dtype):
        weights = parallel.gather(params, dtype, reduce_dtype)
        inputs, targets = (batch[name].astype("bfloat16").astype(dtype) for name in ("inputs", "targets"))
        return jnp.sum((inputs @ weights["kernel"] + weights["bias"]) * targets)

    gradient = parallel.on(mesh, jax.jit(jax.grad(loss), static_argnums=2))
    return {kind: np.asarray(gradient(params, batch, kind)["kernel"]) for kind in ("compute", "float32")}


def lora(mesh, reference: bool = False) -> dict:
    """Losses, gradients and adapter of two steps, in every layer that can have one; offloaded unless `reference`."""
    adapter = LoraConfig(rank=3, alpha=6, targets=("*",), dropout=0.2)
    config = dataclasses.replace(CONFIG, lora=adapter, init_from="a run")
    static = dataclasses.replace(STEP, offload=not reference)
    loss = functools.partial(training_loss, MODEL, FlowConfig(), lora=adapter)
    optimizer = make_optimizer(CONFIG.optimizer, 100)

    def create(codec):
        state = create_state(config, codec)

        def moved(tree, seed):
            leaves, structure = jax.tree.flatten(tree)
            keys = jax.random.split(jax.random.key(seed), len(leaves))
            return structure.unflatten([x + 0.05 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)])

        frozen = {**state.frozen, "denoiser": moved(state.frozen["denoiser"], 7)}
        return state.replace(frozen=frozen, params=moved(state.params, 8))

    codec = {"mean": np.zeros(16, np.float32), "scale": np.ones(1, np.float32)}
    state = parallel.create(create, RULES, mesh, codec, offload=not reference)
    inputs = parallel.place_batch(batch(), mesh)
    gradients = micro_step_on(mesh, loss)[0](state, batch())[1]
    step = jax.jit(functools.partial(train_step, static, loss, optimizer, SCHEDULE), donate_argnums=0)
    run, losses = parallel.on(mesh, step), []
    base = jax.device_get(state.frozen)
    for _ in range(2):
        state, metrics = run(state, inputs)
        losses.append(float(metrics["loss"]))
    assert jax.tree.all(jax.tree.map(np.array_equal, base, jax.device_get(state.frozen)))
    trees = {"params": state.params, "ema": state.ema}
    return {"losses": np.array(losses), "gradients": gradients, **jax.device_get(trees)}


def restore(mesh, reference: bool = False) -> dict:
    """The state of a checkpoint of one device, and which share of their bytes the devices read of it.

    Replicas along `data` share the reading.
    """
    state = new_state(None, trained=True)
    if reference:
        return {"state": to_parts(jax.device_get(state))["ema"]}
    abstract = parallel.abstract(lambda: state, RULES, mesh, offload=True)
    with tempfile.TemporaryDirectory() as folder:
        alone = Store(epath.Path(folder), CheckpointConfig())
        alone.save(0, to_parts(state), {})
        alone.close()
        parts, _ = Store(epath.Path(folder), CheckpointConfig(), mesh).restore(to_parts(abstract))
    restored = from_parts(parts, abstract)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, abstract)
    floats = [x for x in jax.tree.leaves(to_parts(abstract)) if x.dtype == np.float32]
    size = lambda leaves: sum(math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
    share = size(jax.tree.leaves(parallel.spread(floats, mesh))) / size(floats)
    return {"state": to_parts(jax.device_get(restored))["ema"], "share": share}


def difference(actual, expected) -> float:
    """The largest relative difference of any leaf."""
    relative = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return max(jax.tree.leaves(jax.tree.map(relative, actual, expected)))


def main() -> None:
    function = {
        "steps": steps,
        "padding": padding,
        "splash": splash,
        "offload": offload,
        "restore": restore,
        "sums": sums,
        "lora": lora,
    }[sys.argv[1]]
    expected = function(None, reference=True)
    for name in sys.argv[2:]:
        mesh = None if name == "none" else parallel.make_mesh(MeshConfig(*map(int, name.split(","))))
        result = function(mesh)
        for key in result:
            if key not in ("collectives", "programs", "places", "checksums", "share"):
                result[key] = difference(result[key], expected[key])
        print(json.dumps({"mesh": name, **result}), flush=True)


if __name__ == "__main__":
    main()
