"""Aesthetic Predictor v2.5 on SigLIP so400m (report, section 2, step 4): scores of about 1 to 10.

A folder with config.json, preprocessor_config.json and model.safetensors of google/siglip-so400m-patch14-384, and
beside them the predictor's head, `aesthetic_predictor_v2_5.pth` of discus0434/aesthetic-predictor-v2-5, as safetensors.

The head is five linear layers of the pooled features at unit length, with no activation between them. So they are one,
of 1,152 weights, which are multiplied out in float64.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lens_jax.convert import table
from lens_jax.convert.folder import open_component
from lens_jax.convert.table import Rule, Tensors, digest
from lens_jax.data.engine.scorers.tower import Tower, TowerScorer, open_tower
from lens_jax.errors import LensError

HEAD = "aesthetic_predictor_v2_5.safetensors"
# Outputs of its layers, which are every second of a torch.nn.Sequential.
_OUTPUTS = (1024, 128, 64, 16, 1)
_NAMES = tuple(f"scoring_head.{2 * i}" for i in range(len(_OUTPUTS)))


def load(folder: str, dtype: str) -> TowerScorer:
    """The network of a release folder, computing in `dtype`, its head in float32: aesthetic float32 [B]."""
    tower = open_tower(folder, "attention", dtype)
    weights, bias = fold(_open_head(tower), str(tower.folder / HEAD))

    def score(pooled):
        unit = pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)
        return jnp.sum(unit * weights, axis=-1) + bias

    name = f"Aesthetic Predictor v2.5 ({tower.folder.name})"
    return TowerScorer(name, ("aesthetic",), tower.network(score), tower.preprocessing)


def fingerprint(folder: str) -> str:
    """What identifies its weights; LensError where the folder is not one of it."""
    tower = open_tower(folder, "attention")
    return tower.fingerprint(digest(_open_head(tower)))


def fold(head: Tensors, source: str) -> tuple[np.ndarray, np.float32]:
    """The layers as one: (weights float32 [width], bias)."""
    found = table.finite(head, source)
    width = head.shape(f"{_NAMES[0]}.weight")[1]
    weights, bias = np.eye(width), np.zeros(width)
    for name in _NAMES:
        kernel = found[f"{name}.weight"].astype(np.float64)
        weights, bias = kernel @ weights, kernel @ bias + found[f"{name}.bias"].astype(np.float64)
    return weights[0].astype(np.float32), np.float32(bias[0])


def _open_head(tower: Tower) -> Tensors:
    """The tensors of the head by name; LensError where it is not there, or is not of this tower."""
    path = tower.folder / HEAD
    if not path.is_file():
        pickle = Path(HEAD).with_suffix(".pth")
        raise LensError(
            f"{path}: no such file. It is the head {pickle} of github.com/discus0434/aesthetic-predictor-v2-5, a "
            f"pickle, which is not read here; convert it: safetensors.torch.save_file(torch.load('{pickle}', "
            f"weights_only=True), '{HEAD}')"
        )
    tensors = open_component(path)
    sizes = zip(_NAMES, (tower.config.width, *_OUTPUTS), _OUTPUTS)
    rules = [
        rule
        for name, inputs, outputs in sizes
        for rule in (Rule(f"{name}.weight", (outputs, inputs), ""), Rule(f"{name}.bias", (outputs,), ""))
    ]
    table.check(rules, tensors.specs, str(path))
    return tensors
