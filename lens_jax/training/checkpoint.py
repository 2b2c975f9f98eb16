"""Checkpoints: asynchronous, atomic, keep-N; state, data position and resolved config in one folder a step.

    RUN/checkpoints/<step>/params, ema, opt_state, codec, progress    arrays (orbax)
    RUN/checkpoints/<step>/_CHECKPOINT_METADATA                       format, config, data position (JSON)

Orbax writes aside and renames, so a folder named by a step is whole or not there.
"""

import contextlib
import dataclasses
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from lens_jax import config as run_config
from lens_jax.config import TrainConfig
from lens_jax.data.buckets import Bucket
from lens_jax.errors import LensError
from lens_jax.models import codec, denoiser
from lens_jax.models.codec import PixelCodecConfig
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.training.state import State

FORMAT = 1
FOLDER = "checkpoints"
_MAX_METADATA_BYTES = 16_000_000


@dataclasses.dataclass(frozen=True)
class Position:
    """Where in the data a checkpoint stands."""

    # The next batch to be taken.
    next_step: int
    # Identifies the data set, so that a run is not silently resumed on another one.
    fingerprint: str


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, run: Path, keep: int):
        self.folder = run.absolute() / FOLDER
        policies = ocp.training.preservation_policies
        _quieten()
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self.folder, preservation_policy=policies.LatestN(keep), cleanup_tmp_directories=True
            )
        except OSError as error:
            raise LensError(f"{self.folder}: checkpoints cannot be written: {error.strerror}") from None
        self._pending = None
        self._closed = False

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: State, position: Position, config: TrainConfig, sizes: Sequence[Bucket]) -> None:
        """Start saving; returns when the arrays are copied. The previous save is waited for, and its failure raised."""
        self.wait()
        metadata = {
            "format": FORMAT,
            "config": run_config.to_dict(config),
            "position": dataclasses.asdict(position),
            "sizes": [[size.height, size.width] for size in sizes],
        }
        step = int(state.step)
        if step == self.latest_step:
            return
        with self._failures(step):
            save = self._checkpointer.save_checkpointables_async
            self._pending = step, save(step, _parts(state), force=True, custom_metadata=metadata)

    def wait(self) -> None:
        """Wait until what was last saved is on disk."""
        if self._pending is not None:
            (step, response), self._pending = self._pending, None
            with self._failures(step):
                if response is not None:
                    response.result()

    def restore(self, abstract: State) -> tuple[State, Position]:
        """The newest state, as described by `abstract`, and where in the data it stands."""
        step = self.latest_step
        folder = self.folder / str(step)
        metadata = read_metadata(folder)
        wanted = _parts(abstract)
        check_shapes(wanted, saved_shapes(folder), folder)
        parts = self._checkpointer.load_checkpointables(step, wanted)
        progress = parts.pop("progress")
        return State(**{"codec": {}, **parts}, **progress), metadata["position"]

    def close(self) -> None:
        """Wait for what is being saved, then let go of the folder. Closing twice is fine."""
        self.wait()
        if not self._closed:
            self._closed = True
            self._checkpointer.close()

    @contextlib.contextmanager
    def _failures(self, step: int):
        """Turns a failed save into one line that says what is still whole."""
        try:
            yield
        except LensError:
            raise
        except Exception as error:
            # Orbax raises the same failure again when it is closed; it has been told.
            self._closed = True
            with contextlib.suppress(Exception):
                self._checkpointer.close()
            reason = " ".join(str(error).split())[:300]
            raise LensError(
                f"{self.folder / str(step)}: the checkpoint could not be saved ({reason}); "
                "earlier checkpoints are whole"
            ) from None


def _parts(state: State) -> dict[str, Any]:
    """The parts a checkpoint keeps apart, so that sampling reads the average without the optimiser."""
    return {
        "params": state.params,
        "ema": state.ema,
        "opt_state": state.opt_state,
        # A released codec is not saved with a run, and orbax takes no empty tree.
        **({"codec": state.codec} if state.codec else {}),
        "progress": {"step": state.step, "key": state.key},
    }


def find(path: Path) -> Path:
    """The checkpoint folder meant by a checkpoint, a run or its checkpoints folder; the newest if there are several."""
    path = path.absolute()
    if not path.is_dir():
        raise LensError(f"{path}: no such checkpoint; give a run folder, or RUN/{FOLDER}/STEP")
    if (path / "_CHECKPOINT_METADATA").is_file():
        return path
    for parent in (path / FOLDER, path):
        steps = [p for p in parent.glob("*") if p.name.isdigit() and (p / "_CHECKPOINT_METADATA").is_file()]
        if steps:
            return max(steps, key=lambda p: int(p.name))
    raise LensError(f"{path}: holds no checkpoint; a run keeps them in RUN/{FOLDER}/STEP")


def read_metadata(folder: Path) -> dict[str, Any]:
    """`config` (TrainConfig), `position` (Position) and `sizes` ((height, width) it was trained on), checked."""
    path = folder / "_CHECKPOINT_METADATA"
    try:
        if path.stat().st_size > _MAX_METADATA_BYTES:
            raise LensError(f"{path}: too large for checkpoint metadata")
        custom = json.loads(path.read_text(encoding="utf-8"))["custom_metadata"]
        if custom["format"] != FORMAT:
            raise LensError(f"{path}: checkpoint format {custom['format']!r}; this version reads format {FORMAT}")
        config, position = custom["config"], custom["position"]
        sizes = [(int(height), int(width)) for height, width in custom["sizes"]]
        if not sizes or any(min(size) < 1 for size in sizes):
            raise ValueError(sizes)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise LensError(f"{path}: not the metadata of a lens-jax checkpoint") from None
    return {
        "config": run_config.from_dict(TrainConfig, config, str(path)),
        "position": run_config.from_dict(Position, position, str(path), "position."),
        "sizes": sizes,
    }


def saved_shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path -> (shape, dtype) of every array of a checkpoint, from its metadata alone."""
    try:
        parts = ocp.checkpointables_metadata(folder).metadata
    except (OSError, ValueError, KeyError) as error:
        raise LensError(f"{folder}: its array metadata cannot be read ({' '.join(str(error).split())[:200]})") from None
    return {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in _leaves(parts)}


def check_shapes(wanted: dict[str, Any], saved: dict[str, tuple[tuple[int, ...], str]], folder: Path) -> None:
    """One error that lists every array that is missing or of another shape."""
    problems = []
    for path, leaf in _leaves(wanted):
        if path not in saved:
            problems.append(f"{path} is missing")
        elif not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) and saved[path][0] != tuple(leaf.shape):
            problems.append(f"{path} is {list(saved[path][0])}, this model has {list(leaf.shape)}")
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise LensError(f"{folder}: a checkpoint of another model, {len(problems)} arrays differ: {shown}")


def abstract_params(config: DenoiserConfig, part: str) -> dict:
    """What `load_parts` needs for a part "params" (in `config.param_dtype`) or "ema" (float32)."""
    abstract = denoiser.abstract_params(config)
    in_float32 = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return abstract if part == "params" else jax.tree.map(in_float32, abstract)


def abstract_codec(config: TrainConfig) -> dict:
    """What `load_parts` needs for the part "codec": the pixel codec's statistics; a released codec is not saved."""
    return codec.abstract_params(config.codec) if isinstance(config.codec, PixelCodecConfig) else {}


def load_parts(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Some parts of a checkpoint, e.g. `{"ema": abstract tree}`, checked before they are read."""
    empty = {name: {} for name, tree in wanted.items() if not tree}
    wanted = {name: tree for name, tree in wanted.items() if tree}
    check_shapes(wanted, saved_shapes(folder), folder)
    _quieten()
    try:
        return {**ocp.load_checkpointables(folder, wanted), **empty}
    except Exception as error:  # orbax raises many kinds; all mean the files are damaged
        raise LensError(f"{folder}: damaged ({' '.join(str(error).split())[:200]})") from None


def _leaves(tree) -> list[tuple[str, Any]]:
    """Leaves by path, the same for namedtuples and for the lists and dicts that metadata holds in their place."""
    return [
        ("/".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", "")))) for k in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _quieten() -> None:
    """Orbax logs each step of each save, and a failure as pages of tracebacks; ours says it in one line."""
    logging.getLogger("absl").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", message="Sharding info not provided when restoring")
    # Saves in parallel; when one fails, what the others were about to write is dropped, and asyncio says so.
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
