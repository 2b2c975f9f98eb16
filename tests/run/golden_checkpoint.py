"""Writes tests/goldens/checkpoint_3, a checkpoint of format 3 that every later version must read.

python tests/run/golden_checkpoint.py FOLDER

A state after two steps of a denoiser of width 8, and the latents that its average draws. Its config is of another
version: with fields that this one does not know, and without some that it has.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lens_jax import config as config_files
from lens_jax.data.mixture import START
from lens_jax.diffusion import draw
from lens_jax.encoders.linear import LinearCodecConfig
from lens_jax.encoders.text import TextFeatures
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.layers import joint_positions
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.recipe import create_state, make_programs
from lens_jax.run.config import CheckpointConfig
from lens_jax.run.state import State, to_parts
from lens_jax.run.store import Store

MODEL = DenoiserConfig(
    layers=2, heads=1, head_dim=8, rope_axes=(2, 2, 4), latent_channels=12, text_width=512, text_layers=1, mlp_width=16,
    dtype="float32",
)  # fmt: skip
CONFIG = TrainConfig(model=MODEL, codec=LinearCodecConfig(patch=2, components=12), steps=4)


def batch(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "latents": rng.standard_normal((2, 16, 12), np.float32),
        "text": (rng.standard_normal((2, 3, 512), np.float32),),
        "text_lengths": np.array([3, 1], np.int32),
        "positions": joint_positions(4, 4, 3),
    }


def trained() -> State:
    """After two steps."""
    fitted = {"basis": np.eye(12, dtype=np.float32), "mean": np.full(12, 0.1, np.float32), "scale": np.float32([0.5])}
    state = jax.jit(functools.partial(create_state, CONFIG))(fitted)
    # Away from zeros, which would leave most of what is drawn untouched by the weights.
    keys = iter(jax.random.split(jax.random.key(1), 100))
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), state.params)
    state = state.replace(params=moved, ema=jax.tree.map(jnp.copy, moved))
    for seed in range(2):
        state, _ = make_programs(CONFIG).train_step(state, batch(seed))
    return state


def prompts() -> TextFeatures:
    """Two of them."""
    made = batch(7)
    return TextFeatures(made["text"], made["text_lengths"])


def noise() -> np.ndarray:
    """Where the drawing of the two begins."""
    return np.random.default_rng(3).standard_normal((2, 16, 12), np.float32)


def drawn(params: dict) -> np.ndarray:
    """Latents [2, 16, 12] of four steps with guidance."""
    text = prompts()
    inputs = noise(), (text.layers, text.lengths), None, (4, 4)
    return np.asarray(draw.draw(MODEL, params, *inputs, num_inference_steps=4, guidance_scale=3.0))


def main(folder: Path) -> None:
    state, values = trained(), config_files.to_dict(CONFIG)
    values["model"]["of_a_later_version"] = 7
    values["another"] = {"kind": "Unknown"}
    del values["model"]["remat"], values["optimizer"]["eps"], values["seed"]
    store = Store(epath.Path(folder) / "checkpoints", CheckpointConfig())
    meta = {"kind": "pretraining", "config": values, "position": START.to_json(), "sizes": [[8, 8]]}
    store.save(2, to_parts(state), meta)
    store.close()
    (folder / "drawn.json").write_text(json.dumps(drawn(state.ema["denoiser"]).tolist()) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
