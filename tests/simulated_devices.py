"""Run by tests in a process of its own: eight simulated devices have to be asked for before JAX starts.

python simulated_devices.py MESH ...   prints, for each mesh "data,fsdp,tensor,sequence", five steps as one JSON line.
"""

import dataclasses
import functools
import json
import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402

from lens_jax import sharding  # noqa: E402
from lens_jax.diffusion.flow import FlowConfig  # noqa: E402
from lens_jax.models.denoiser import DenoiserConfig  # noqa: E402
from lens_jax.models.layers import joint_positions  # noqa: E402
from lens_jax.sharding import MeshConfig  # noqa: E402
from lens_jax.training.optimizer import OptimizerConfig, make_optimizer  # noqa: E402
from lens_jax.training.state import create_state  # noqa: E402
from lens_jax.training.step import StepConfig, train_step  # noqa: E402

MODEL = DenoiserConfig(
    layers=2, heads=8, head_dim=16, rope_axes=(4, 6, 6), latent_channels=16, text_width=24, text_layers=2,
    mlp_width=336, dtype="float32",
)  # fmt: skip
STEP = StepConfig(MODEL, FlowConfig(), ema_decay=0.99, skip_nonfinite=False)
OPTIMIZER = make_optimizer(OptimizerConfig(warmup_steps=1, learning_rate=1e-3), 100)
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def batch() -> dict:
    """Eight rows of 4 x 4 latent tokens, eight text tokens, of which a row has one to eight."""
    rng = np.random.default_rng(0)
    text = tuple(rng.standard_normal((8, 8, 24), np.float32) for _ in range(2))
    return {
        "latents": rng.standard_normal((8, 16, 16), np.float32),
        "text": text,
        "text_lengths": np.arange(1, 9, dtype=np.int32),
        "positions": joint_positions(4, 4, 8),
    }


def five_steps(mesh) -> dict:
    """Losses, gradient norms, parameters and the collectives of the compiled step."""
    codec = {"mean": np.zeros(16, np.float32), "std": np.ones(16, np.float32)}
    state = sharding.create(functools.partial(create_state, MODEL, OPTIMIZER, seed=0), mesh, codec)
    inputs = sharding.place_batch(batch(), mesh)
    step = jax.jit(functools.partial(train_step, STEP, OPTIMIZER), donate_argnums=0)
    program = sharding.on(mesh, lambda *args: step.lower(*args).compile())(state, inputs)
    text = program.as_text()
    losses, norms = [], []
    for _ in range(5):
        state, metrics = program(state, inputs)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["gradient_norm"]))
    return {
        "losses": losses,
        "norms": norms,
        "params": jax.device_get(state.params),
        "specs": jax.tree.map(lambda x: str(x.sharding.spec), state.params) if mesh else None,
        "collectives": {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in COLLECTIVES},
    }


def main() -> None:
    expected = five_steps(None)
    difference = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))
    for name in sys.argv[1:]:
        config = MeshConfig(*map(int, name.split(",")))
        actual = five_steps(sharding.make_mesh(config))
        pairs = zip(jax.tree.leaves(actual["params"]), jax.tree.leaves(expected["params"]))
        result = {
            "mesh": dataclasses.astuple(config),
            "losses": difference(np.array(actual["losses"]), np.array(expected["losses"])),
            "norms": difference(np.array(actual["norms"]), np.array(expected["norms"])),
            "params": max(difference(a, b) for a, b in pairs),
            "collectives": actual["collectives"],
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
