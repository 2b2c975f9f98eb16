"""Run by a test in a process of its own, on eight simulated devices.

python draw_on_meshes.py MESH ...   prints for each mesh "data,fsdp,tensor,sequence", as one JSON line: how far images
are from those of one device; the most bytes of the parameters that a device holds, and what the compiled program needs
besides its arguments, both as shares of all parameters.
"""

import json
import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402

from lens_jax import LensPipeline, parallel  # noqa: E402
from lens_jax.diffusion import draw, sampler  # noqa: E402
from lens_jax.encoders.linear import LinearCodecConfig  # noqa: E402
from lens_jax.encoders.text import TextFeatures  # noqa: E402
from lens_jax.models import denoiser  # noqa: E402
from lens_jax.models.denoiser import DenoiserConfig  # noqa: E402
from lens_jax.models.layers import joint_positions  # noqa: E402
from lens_jax.parallel import MeshConfig  # noqa: E402

# Deep, so that one block is a small part of all.
MODEL = DenoiserConfig(
    layers=16, heads=8, head_dim=16, mlp_width=344, rope_axes=(4, 6, 6), latent_channels=48, text_width=64,
    text_layers=2, dtype="float32",
)  # fmt: skip
CODEC = LinearCodecConfig(patch=4, components=48)


def parameters() -> dict:
    """Every leaf non-zero, or neither the text nor the depth would matter."""
    leaves, tree = jax.tree.flatten(denoiser.init(MODEL, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([np.asarray(x + 0.02 * jax.random.normal(k, x.shape)) for k, x in zip(keys, leaves)])


def pipeline(params: dict, mesh=None) -> LensPipeline:
    """The memory of the host is where an offloaded average is."""
    stats = {"basis": np.eye(48, dtype=np.float32), "mean": np.full(48, 0.1, np.float32), "scale": np.float32([0.5])}
    if mesh is not None:
        specs = parallel.tree_specs(parallel.DENOISER_RULES, params, mesh)
        away = jax.tree.map(lambda s: s.with_memory_kind(parallel.HOST), parallel.shardings(mesh, specs))
        params = parallel.on_device(jax.tree.map(jax.device_put, params, away), mesh)
    return LensPipeline(MODEL, CODEC, None, params, stats, (16, 16), mesh=mesh)


def text(count: int, seed: int) -> TextFeatures:
    rng = np.random.default_rng(seed)
    layers = tuple(rng.standard_normal((count, 6, 64), np.float32) for _ in range(2))
    return TextFeatures(layers, np.array([6, 0, 3, 1, 5, 2, 4, 6][:count], np.int32))


def images(pipe: LensPipeline) -> np.ndarray:
    """Of five prompts, which no mesh divides: guided by no text, not guided, guided by other text."""
    options = ({}, {"guidance_scale": 1.0}, {"negative_prompt_embeds": text(5, 1), "solver": "dpm2"})
    common = {"prompt_embeds": text(5, 0), "num_inference_steps": 3, "seed": 3, "output_type": "np"}
    return np.stack([pipe(**common, **more).images for more in options])


def held(params: dict) -> int:
    """The most bytes that a device has of a tree."""
    on = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            on[shard.device] += shard.data.nbytes
    return max(on.values())


def needed(pipe: LensPipeline) -> int:
    """Bytes that the compiled program needs on a device besides its arguments."""
    layers, lengths, _ = text(8, 0)
    noise, prompts = draw.spread((draw.seed_noise(0, 8, 16, 48), (layers, lengths)), pipe.mesh)
    rest = joint_positions(4, 4, 6), sampler.sigma_schedule(16, 3), np.float32(5)
    with jax.set_mesh(pipe.mesh):
        compiled = draw.draw_program.lower(MODEL, "euler", pipe.params, noise, prompts, None, *rest).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    params = parameters()
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    expected = images(pipeline(params))
    for name in sys.argv[1:]:
        mesh = parallel.make_mesh(MeshConfig(*map(int, name.split(","))))
        pipe = pipeline(params, mesh)
        error = float(np.abs(images(pipe) - expected).max())
        shares = {"held": held(pipe.params) / total, "needed": needed(pipe) / total}
        print(json.dumps({"mesh": name, "error": error, **shares}), flush=True)


if __name__ == "__main__":
    main()
