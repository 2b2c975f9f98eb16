"""SigLIP 2 as a classifier of visible watermarks (report, section 2, step 5): a folder with config.json,
preprocessor_config.json and model.safetensors of prithivMLmods/Watermark-Detection-SigLIP2.

The report names no network. By the model's own card its recall of watermarks is 0.905, its precision 0.962.
"""

import jax

from lens_jax.convert.vit import labels
from lens_jax.data.engine.scorers.tower import Tower, TowerScorer, open_tower
from lens_jax.errors import LensError


def load(folder: str, dtype: str) -> TowerScorer:
    """The network of a release folder, computing in `dtype`: watermark float32 [B], the probability of one."""
    tower = open_tower(folder, "mean", dtype)
    column = _column(tower)
    probability = lambda logits: jax.nn.softmax(logits)[:, column]
    name = f"SigLIP 2 watermark classifier ({tower.folder.name})"
    return TowerScorer(name, ("watermark",), tower.network(probability), tower.preprocessing)


def fingerprint(folder: str) -> str:
    """What identifies its weights; LensError where the folder is not one of it."""
    tower = open_tower(folder, "mean")
    return tower.fingerprint(str(_column(tower)))


def _column(tower: Tower) -> int:
    """The class that is called a watermark."""
    where = tower.folder / "config.json"
    names = [name.lower() for name in labels(tower.values, str(where))]
    if len(names) != 2 or names.count("watermark") != 1:
        raise LensError(f'{where}: id2label is {names!r:.80}; accepted: two classes, of which one is "Watermark"')
    return names.index("watermark")
