"""Run by a test in a process of its own, on eight simulated devices.

python rl_on_meshes.py ALGORITHM MESH ...   draws, judges and updates once on each mesh "data,fsdp,tensor,sequence",
and prints for each how far parameters, moments and loss are from those of one device, relative to their size, as JSON.
"""

import json
import os
import sys
import tempfile

import jax

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402

from lens_jax import parallel  # noqa: E402
from lens_jax.encoders.linear import LinearCodecConfig  # noqa: E402
from lens_jax.encoders.sentence import SentenceEncoderConfig  # noqa: E402
from lens_jax.models import denoiser  # noqa: E402
from lens_jax.models.denoiser import DenoiserConfig  # noqa: E402
from lens_jax.models.lora import LoraConfig  # noqa: E402
from lens_jax.parallel import MeshConfig  # noqa: E402
from lens_jax.posttraining.prompts.prompt import Prompt  # noqa: E402
from lens_jax.posttraining.rewards.combine import Judging  # noqa: E402
from lens_jax.posttraining.rewards.reward import Score  # noqa: E402
from lens_jax.posttraining.rl_config import RlConfig, RolloutConfig  # noqa: E402
from lens_jax.posttraining.rl_job import Rl  # noqa: E402
from lens_jax.pretraining.config import SheetConfig  # noqa: E402
from lens_jax.run.log import Log  # noqa: E402
from lens_jax.run.optimizer import OptimizerConfig  # noqa: E402

MODEL = DenoiserConfig(
    layers=2, heads=4, head_dim=16, rope_axes=(4, 6, 6), latent_channels=48, text_width=512, text_layers=1,
    mlp_width=128, dtype="float32",
)  # fmt: skip


class Rounded:
    """How red an image is, rounded: a pixel that rounding moved by a level must not become another reward."""

    name = "red"

    def check(self):
        pass

    def close(self):
        pass

    def score(self, images, prompts):
        return [Score({"red": round(float(image[..., 0].mean()) / 255, 2)}) for image in images]


def random(tree, seed: int):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([0.1 * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys)])


class FromNothing(Rl):
    """Starts from random parameters instead of reading a run."""

    def _load_base(self):
        params = random(denoiser.abstract_params(self.config.model), 0)
        if self._mesh is not None:
            like = parallel.abstract_params(params, parallel.DENOISER_RULES, self._mesh)
            params = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), params, like)
        width = self.config.codec.latent_channels
        return params, {
            "mean": np.zeros(width, np.float32),
            "basis": np.eye(width, dtype=np.float32),
            "scale": np.float32([0.5]),
        }


def one_update(algorithm: str, mesh) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        config = RlConfig(
            out=folder,
            init_from="nothing",
            algorithm=algorithm,
            steps=1,
            lora=LoraConfig(rank=2, alpha=4, targets=("attention", "mlp")),
            rollout=RolloutConfig(groups=2, images=8, sizes=("8x8", "8x16"), batch_size=8, num_inference_steps=3),
            samples=SheetConfig(every=0),
            model=MODEL,
            codec=LinearCodecConfig(patch=4, components=48),
            text=SentenceEncoderConfig(max_tokens=2),
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        )
        prompts = [Prompt("a", "red apple"), Prompt("b", "two cats, a house")]
        log = Log(config.out, 1, config.logging, config.profile, Console(quiet=True))
        log.open(0, {"config": {}})
        job = FromNothing(config, mesh, log, prompts, (), Judging([(Rounded(), 1.0)], [], 0.1, 2))
        job.check()
        state = job.create()
        state, metrics = job.step(state, job.batches(None))
        # Adam's moments of a first step are the gradients and their squares, by a factor.
        moments = [x for x in jax.tree.leaves(state.opt_state) if np.ndim(x)]
        parts = {"params": state.params, "moments": moments, "old": state.extra["old"], "loss": metrics["loss"]}
        return {name: [np.asarray(x) for x in jax.tree.leaves(jax.device_get(tree))] for name, tree in parts.items()}


def main() -> None:
    algorithm, *meshes = sys.argv[1:]
    expected = one_update(algorithm, None)
    for name in meshes:
        found = one_update(algorithm, parallel.make_mesh(MeshConfig(*map(int, name.split(",")))))
        errors = {}
        for part, leaves in expected.items():
            difference = sum(float(np.square(a - b).sum()) for a, b in zip(found[part], leaves)) ** 0.5
            # A policy's loss may be zero but for rounding: it is told by the size of advantages, which is 1.
            size = 1.0 if part == "loss" else sum(float(np.square(b).sum()) for b in leaves) ** 0.5
            errors[part] = difference / size
        print(json.dumps({"mesh": name, "errors": errors}), flush=True)


if __name__ == "__main__":
    main()
