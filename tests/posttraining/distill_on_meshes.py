"""Run by a test in a process of its own, on eight simulated devices.

python distill_on_meshes.py full|lora MESH ...   takes an update of fake score and discriminator, one of the student and
one of the warm start on each mesh "data,fsdp,tensor,sequence", and prints for each how far parameters, moments and loss
are from those of one device, relative to their size, as JSON.
"""

import functools
import json
import os
import sys

import jax

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from lens_jax import parallel  # noqa: E402
from lens_jax.diffusion import sampler  # noqa: E402
from lens_jax.models import denoiser  # noqa: E402
from lens_jax.models.denoiser import DenoiserConfig  # noqa: E402
from lens_jax.models.layers import joint_positions  # noqa: E402
from lens_jax.models.lora import LoraConfig  # noqa: E402
from lens_jax.parallel import MeshConfig  # noqa: E402
from lens_jax.posttraining import distill_recipe as recipe  # noqa: E402
from lens_jax.posttraining.distill_config import (  # noqa: E402
    DiscriminatorConfig,
    DistillConfig,
    GeneratorConfig,
    WarmStartConfig,
)
from lens_jax.posttraining.distill_discriminator import neighbours  # noqa: E402
from lens_jax.run.optimizer import OptimizerConfig  # noqa: E402

MODEL = DenoiserConfig(
    layers=2, heads=4, head_dim=16, rope_axes=(4, 6, 6), latent_channels=16, text_width=32, text_layers=1,
    mlp_width=128, dtype="float32",
)  # fmt: skip
ROWS, GRID, PADDED, TEXT = 16, (2, 3), 8, 2


def config_of(kind: str) -> DistillConfig:
    # Adam without a first moment divides a first gradient by itself: its sign, which rounding turns. Of a large eps
    # updates are as exact as gradients.
    smooth = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, beta1=0.0, beta2=0.9, eps=1.0, clip_norm=1e9)
    return DistillConfig(
        lora=LoraConfig(rank=2, alpha=4, targets=("attention", "mlp")) if kind == "lora" else LoraConfig(),
        discriminator=DiscriminatorConfig(width=8, groups=2, weight=0.1),
        generator=GeneratorConfig(trained_step="sample", transition="renoise"),
        warm_start=WarmStartConfig(steps=1, substeps=1),
        model=MODEL,
        optimizer=smooth,
        fake_optimizer=smooth,
        head_optimizer=smooth,
    )


def random(like, seed: int):
    leaves, structure = jax.tree.flatten(like)
    draw = lambda i, x: 0.1 * np.random.default_rng((seed, i)).standard_normal(x.shape).astype(np.float32)
    return structure.unflatten([draw(i, x) for i, x in enumerate(leaves)])


def begin(config: DistillConfig, fitted, params):
    """A state in the middle of a run: a fresh adapter's B is zero, then nothing but its first updates, and rounding
    would be told by their size."""
    state = recipe.create_state(config, fitted, params)
    if not config.lora.rank:
        return state
    moved = lambda trees: {
        name: jax.tree.map(jnp.add, tree, random(tree, 2)) if name in ("lora", "fake") else tree
        for name, tree in trees.items()
    }
    return state.replace(params=moved(state.params), ema=moved(state.ema))


def updates(config: DistillConfig, mesh) -> dict:
    params = random(denoiser.abstract_params(config.model), 0)
    if mesh is not None:
        like = parallel.abstract_params(denoiser.abstract_params(config.model), parallel.DENOISER_RULES, mesh)
        params = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), params, like)
    state = parallel.create(functools.partial(begin, config), recipe.rules(config), mesh, {}, params)
    values = np.random.default_rng(1)
    normal = lambda *shape: values.standard_normal(shape).astype(np.float32)
    image = joint_positions(*GRID, TEXT)
    positions = np.insert(image, [GRID[0] * GRID[1]] * (PADDED - GRID[0] * GRID[1]), 0, axis=0)
    batch = {
        "latents": normal(ROWS, PADDED, MODEL.latent_channels),
        "text": (normal(ROWS, TEXT, MODEL.text_width),),
        "text_lengths": np.arange(ROWS, dtype=np.int32) % (TEXT + 1),
        "positions": positions,
        "n_image": np.int32(GRID[0] * GRID[1]),
    }
    batch = parallel.place_batch(batch, mesh)
    whole = {"sigmas": sampler.sigma_schedule(6, 4), "neighbours": neighbours(GRID, PADDED)}
    batch |= {name: parallel.everywhere(value, mesh) for name, value in whole.items()}
    programs = recipe.make_programs(config)
    on = functools.partial(parallel.on, mesh)
    state, warm = on(programs.warm_start.train_step)(state, batch, 2)
    state, fake = on(programs.fake.train_step)(state, batch, 0)
    state, student = on(programs.student.train_step)(state, batch, 1)
    metrics = on(programs.joined)([fake], student)
    moments = [x for x in jax.tree.leaves(state.opt_state) if np.ndim(x)]
    parts = {"params": state.params, "ema": state.ema, "moments": moments, "warm": warm["loss"]}
    parts |= {name: metrics[name] for name in ("loss", "fake_loss", "ca_size", "real_logit", "r1")}
    return {name: [np.asarray(x) for x in jax.tree.leaves(jax.device_get(tree))] for name, tree in parts.items()}


def error(actual: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest relative distance of an array."""
    apart = lambda a, b: float(np.linalg.norm(np.nan_to_num(a - b)) / max(np.linalg.norm(np.nan_to_num(b)), 1e-12))
    return max(map(apart, actual, expected))


def main() -> None:
    kind, *meshes = sys.argv[1:]
    config = config_of(kind)
    alone = updates(config, None)
    for text in meshes:
        mesh = parallel.make_mesh(MeshConfig(*map(int, text.split(","))))
        found = updates(config, mesh)
        errors = {name: error(found[name], alone[name]) for name in alone}
        print(json.dumps({"mesh": text, "errors": errors}), flush=True)


if __name__ == "__main__":
    main()
