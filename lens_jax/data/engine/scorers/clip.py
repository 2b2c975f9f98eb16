"""CLIP ViT-L/14, whose vectors near duplicates are looked for by (report, section 2, step 9): a folder with
config.json, preprocessor_config.json and model.safetensors of openai/clip-vit-large-patch14."""

from dataclasses import dataclass

import jax.numpy as jnp

from lens_jax.data.engine.scorers.tower import TowerScorer, open_tower


@dataclass(frozen=True)
class Clip(TowerScorer):
    """The loaded network."""

    # Numbers of a vector.
    width: int


def load(folder: str, dtype: str) -> Clip:
    """The network of a release folder, computing in `dtype`: embedding float32 [B, width], of unit length."""
    tower = open_tower(folder, "class", dtype)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    name = f"CLIP ({tower.config.layers} x {tower.config.width}, {tower.folder.name})"
    return Clip(name, ("embedding",), tower.network(unit), tower.preprocessing, tower.config.outputs)


def fingerprint(folder: str) -> str:
    """What identifies its weights; LensError where the folder is not one of it."""
    return open_tower(folder, "class").fingerprint()
