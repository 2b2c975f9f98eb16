"""Which kinds of prompts a model has something to learn of, by its own report of the scene benchmark.

Of a kind that it always or never draws right, all images of a prompt are alike, and nothing tells good from bad.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from lens_jax.errors import LensError

NAME = "scenes.json"
_MAX_BYTES = 1 << 30


def tasks_between(path: str | Path, tasks: Sequence[str], between: tuple[float, float]) -> tuple[str, ...]:
    """Those of `tasks` of which the report, a scenes.json or the folder of one, has a share within `between` that meets
    everything asked. LensError for another file, and where there is none."""
    file = Path(path) / NAME if Path(path).is_dir() else Path(path)
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise LensError(f"{file}: over {_MAX_BYTES} bytes, no report of the scene benchmark")
        found = json.loads(file.read_bytes())["scores"]["criteria by task"]
        shares = {task: float(found[task]["everything"]["share"]) for task in tasks if task in found}
    except OSError as error:
        raise LensError(f"{file}: cannot be read: {error.strerror}; write it with --bench scenes --out") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise LensError(f"{file}: no report of `lens-jax evaluate --bench scenes` of this version") from None
    chosen = tuple(task for task, share in shares.items() if between[0] <= share <= between[1])
    if not chosen:
        measured = ", ".join(f"{task} {share:.2f}" for task, share in shares.items()) or "none of the tasks"
        raise LensError(f"{file}: no task from {between[0]:g} to {between[1]:g}; it has {measured}")
    return chosen
