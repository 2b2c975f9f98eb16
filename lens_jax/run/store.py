"""Checkpoints: asynchronous, atomic, kept by number and by interval; a folder a step, on a disk or in an object store.

    RUN/checkpoints/<step>/params, frozen, ema, opt_state, extra, progress    arrays (orbax), each process its parts
    RUN/checkpoints/<step>/_CHECKPOINT_METADATA    format, checksums, and what the job says of itself: its kind, config
                                                   and position in the data, as plain JSON

Orbax writes aside and renames, or in an object store writes a marker last, so a folder named by a step is whole or not
there; checksums tell when that has changed since. A save counts, and older ones are deleted, only after its index was
read back (`saved_index`). Nothing here knows what is trained: what a config means is read by
those who need it, so a field more or less in a config makes no checkpoint unreadable.
"""

import contextlib
import importlib.util
import json
import logging
import warnings
import zlib
from collections.abc import Callable
from os import PathLike
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from lens_jax import parallel
from lens_jax.errors import LensError
from lens_jax.run import saved_index
from lens_jax.run.config import CheckpointConfig
from lens_jax.run.integrity import checksums, leaves_by_path
from lens_jax.run.plain_path import plain

FORMAT = 3
FOLDER = "checkpoints"
METADATA = "_CHECKPOINT_METADATA"
_MAX_METADATA_BYTES = 16_000_000


class DamagedError(LensError):
    """A checkpoint that is not what was saved."""


def folder_of(out: str, config: CheckpointConfig) -> epath.Path:
    """The folder of a run's checkpoints."""
    # From the run and not from where the command was given, which the next one need not be.
    return _from(as_path(out), config.path or FOLDER)


def _from(run: epath.Path, path: str) -> epath.Path:
    return as_path(path) if "://" in path else run / path


class Store:
    """The checkpoints of one run. On a mesh all processes do all of it together.

    The folder is made by the first save, so that a start that is refused leaves nothing behind.
    """

    def __init__(self, folder: epath.Path, config: CheckpointConfig, mesh: Mesh | None = None):
        self.folder, self._config, self._mesh = epath.Path(folder), config, mesh
        # The newest step that is known to be on disk.
        self.acknowledged: int | None = None
        # Refuses here what orbax could not write to, and not after hours.
        plain(self.folder)
        self._checkpointer: ocp.training.Checkpointer | None = None
        self._pending = None
        self._last: int | None = None

    def _open(self) -> ocp.training.Checkpointer:
        if self._checkpointer is None:
            # Orbax would delete older ones before the new one has been looked at.
            policy = ocp.training.preservation_policies.PreserveAll()
            _quieten()
            try:
                # What a link leads to is not made through it.
                self.folder.mkdir(parents=True, exist_ok=True)
                self._checkpointer = ocp.training.Checkpointer(
                    plain(self.folder), preservation_policy=policy, cleanup_tmp_directories=True
                )
            except OSError as error:
                raise LensError(f"{self.folder}: checkpoints cannot be written: {error.strerror or error}") from None
            latest = self._checkpointer.latest
            self._last = None if latest is None else latest.step
        return self._checkpointer

    def save(self, step: int, parts: dict[str, Any], meta: dict[str, Any]) -> None:
        """Start saving; returns when the arrays are copied. The previous save is waited for, and its failure raised.

        parts: trees of arrays by name. meta: plain JSON values, which `restore` and `read_metadata` give back.
        """
        self.wait()
        checkpointer = self._open()
        if step == self._last:
            return
        metadata = {**meta, "format": FORMAT, "checksums": checksums(parts, self._mesh)}
        metadata["checksum"] = _checksum(metadata)
        described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), parts)
        with self._failures(step):
            plain(self.folder)  # a cleaner of temporary files may have been there
            saving = checkpointer.save_checkpointables_async(step, parts, force=True, custom_metadata=metadata)
            self._pending, self._last = (step, saving, described), step

    def wait(self) -> None:
        """Wait until what was last saved is on disk, and look whether it is; then delete older ones."""
        if self._pending is not None:
            (step, response, parts), self._pending = self._pending, None
            with self._failures(step):
                if response is not None:
                    response.result()
                self._look_at(step, parts)
            self.acknowledged = step
            self._delete_older()

    def _look_at(self, step: int, parts: dict[str, Any]) -> None:
        """OSError where the checkpoint of a step is not `parts`."""
        place = self.folder / str(step)
        if jax.process_index() == 0:
            check_shapes(parts, saved_shapes(place), place)
            if problem := saved_index.problem(plain(place), parts):
                raise OSError(problem)
        if self._config.verify == "contents":
            for name, tree in parts.items():  # one by one, since each is in memory a second time
                load(place, {name: tree}, self._mesh)

    def _delete_older(self) -> None:
        """All but the newest `keep` and those of every `keep_every` steps."""
        steps = sorted(_steps(self.folder)) if jax.process_index() == 0 else []
        for step in steps[: -self._config.keep]:
            if not self._config.keep_every or step % self._config.keep_every:
                try:
                    (self.folder / str(step)).rmtree()
                except OSError as error:
                    raise LensError(
                        f"{self.folder / str(step)}: cannot be deleted: {error.strerror or error}"
                    ) from None

    def close(self) -> None:
        """Wait for what is being saved, then let go of the folder. Closing twice is fine."""
        self.wait()
        if self._checkpointer is not None:
            checkpointer, self._checkpointer = self._checkpointer, None
            checkpointer.close()

    def abandon(self) -> None:
        """Let go of the folder without waiting: the others are gone, or somebody is in a hurry."""
        self._pending, self._checkpointer = None, None

    @contextlib.contextmanager
    def _failures(self, step: int):
        """Turns a failed save into one line that says what is still whole."""
        try:
            yield
        except LensError:
            raise
        except Exception as error:
            # Orbax raises the same failure again when it is closed; it has been told.
            checkpointer, self._checkpointer = self._checkpointer, None
            with contextlib.suppress(Exception):
                checkpointer.close()
            raise LensError(
                f"{self.folder / str(step)}: the checkpoint could not be saved ({_one_line(error, 300)}); "
                "earlier checkpoints are whole"
            ) from None

    def restore(
        self, wanted: dict[str, Any], say: Callable[[str], None] = print
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The newest whole checkpoint: its parts as `wanted` describes them, and what was saved as `meta`.

        One that is damaged is told by `say`, set aside as STEP.damaged, and the one before it is taken: all processes
        take the same one, whoever sees the damage. None without any; LensError when none is whole, or where one is of
        another model.
        """
        folder, mesh = self.folder, self._mesh
        damaged, step = {}, None
        while (step := _newest(folder, step, mesh)) is not None:
            problem, place = None, folder / str(step)
            try:
                metadata, saved = read_metadata(place), saved_shapes(place)
                check_shapes(wanted, saved, place)
                parts = _load(place, parallel.spread(wanted, mesh))
            except DamagedError as error:
                problem = str(error)
            # Nobody goes on to what takes all of them before everybody has read its own.
            if not _anybody(problem is not None, mesh):
                parts = parallel.replicate(parts, wanted, mesh)
                problem = _differences(parts, metadata["checksums"], place, mesh)
            elif problem is None:
                problem = f"{place}: another process could not read its parts"
            if problem is None:
                _set_aside(folder, damaged, mesh, lambda line: say(f"{line}; step {step} is used instead"))
                return parts, metadata
            damaged[step] = problem
        if damaged:
            raise LensError(f"no whole checkpoint is left: {'; '.join(damaged.values())}")
        return None


def _newest(folder: epath.Path, before: int | None, mesh: Mesh | None) -> int | None:
    """The newest step, older than `before`: what process 0 sees."""
    steps = _steps(folder) if jax.process_index() == 0 else []
    newest = max((step for step in steps if before is None or step < before), default=-1)
    newest = newest if mesh is None else int(parallel.largest(newest, mesh))
    return None if newest < 0 else newest


def _anybody(yes: bool, mesh: Mesh | None) -> bool:
    return yes if mesh is None else bool(int(parallel.largest(int(yes), mesh)))


def _set_aside(folder: epath.Path, damaged: dict[int, str], mesh: Mesh | None, say: Callable[[str], None]) -> None:
    """Rename damaged checkpoints, so that nothing takes them for the newest."""
    for step, problem in damaged.items():
        aside = folder / f"{step}.damaged"
        if jax.process_index() == 0:
            try:
                if aside.exists():
                    aside.rmtree()
                (folder / str(step)).rename(aside)
            except OSError as error:
                raise LensError(f"{problem}; it cannot be renamed ({error.strerror or error})") from None
        say(f"{problem}; set aside as {aside.name}")
    # The others must not list the folder before that.
    _anybody(False, mesh)


def as_path(path: str | PathLike) -> epath.Path:
    """A path, or an address in an object store."""
    path = epath.Path(path)
    if "://" not in str(path):
        return path.absolute()
    if importlib.util.find_spec("gcsfs") is None:
        raise LensError(f'{path} needs one more package: pip install "lens-jax[gcs]"')
    return path


def find(path: str | PathLike) -> epath.Path:
    """The checkpoint folder meant by a checkpoint, a run or its checkpoints folder; the newest if there are several."""
    path = as_path(path)
    if not path.is_dir():
        raise LensError(f"{path}: no such checkpoint; give a run folder, or RUN/{FOLDER}/STEP")
    if (path / METADATA).is_file():
        return path
    for parent in _places(path):
        if steps := _steps(parent):
            return parent / str(max(steps))
    raise LensError(f"{path}: holds no checkpoint; a run keeps them in RUN/{FOLDER}/STEP")


def is_run(path: epath.Path) -> bool:
    """Whether `find` would find a checkpoint."""
    return (path / METADATA).is_file() or any(_steps(place) for place in _places(path))


def _places(path: epath.Path) -> list[epath.Path]:
    """Where checkpoints may be of a run, or of its checkpoints folder, at `path`."""
    places = [path / FOLDER, path]
    try:
        if elsewhere := json.loads((path / "config.json").read_text())["checkpoint"]["path"]:
            places.insert(0, _from(path, elsewhere))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not the folder of a run
    return places


def _steps(folder: epath.Path) -> list[int]:
    """The steps a folder has checkpoints of, whole or damaged."""
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []


def read_metadata(folder: epath.Path) -> dict[str, Any]:
    """What was saved as `meta`, with `format` and `checksums`; DamagedError where it is not what was saved."""
    path = epath.Path(folder) / METADATA
    try:
        if path.stat().length > _MAX_METADATA_BYTES:
            raise DamagedError(f"{path}: too large for checkpoint metadata")
        custom = json.loads(path.read_text())["custom_metadata"]
        if custom["format"] != FORMAT:
            raise LensError(f"{path}: checkpoint format {custom['format']!r}; this version reads format {FORMAT}")
        if custom["checksum"] != _checksum(custom):
            raise ValueError("checksum")
        dict(custom["checksums"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise DamagedError(f"{path}: damaged, or not the metadata of a lens-jax checkpoint") from None
    return custom


def _checksum(metadata: dict[str, Any]) -> int:
    """Of all of our metadata but the checksum itself."""
    rest = {name: value for name, value in metadata.items() if name != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def saved_shapes(folder: epath.Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path -> (shape, dtype) of every array of a checkpoint, from its metadata alone."""
    _quieten()
    try:
        with ocp.Context(multiprocessing_options=_alone()):
            parts = ocp.checkpointables_metadata(plain(folder)).metadata
    except Exception as error:  # orbax raises many kinds; all mean the files are damaged
        raise DamagedError(f"{folder}: damaged, its array metadata cannot be read ({_one_line(error)})") from None
    shapes = {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves_by_path(parts)}
    # A part whose index is gone is no part to orbax.
    if gone := read_metadata(folder)["checksums"].keys() - shapes.keys():
        raise DamagedError(f"{folder}: damaged, {len(gone)} of its arrays are gone, among them {min(gone)}")
    return shapes


def check_shapes(wanted: dict[str, Any], saved: dict[str, tuple[tuple[int, ...], str]], folder: epath.Path) -> None:
    """One error that lists every array that is missing or of another shape."""
    problems = list(differences(wanted, saved).values())
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise LensError(f"{folder}: a checkpoint of another model, {len(problems)} arrays differ: {shown}")


def differences(wanted: dict[str, Any], saved: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, str]:
    """Path -> what is wrong with it, of every wanted array that is missing, or of another shape or dtype."""
    problems = {}
    for path, leaf in leaves_by_path(wanted):
        if path not in saved:
            problems[path] = f"{path} is missing"
        elif not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            (shape, dtype), name = saved[path], str(leaf.dtype)
            if shape != tuple(leaf.shape):
                problems[path] = f"{path} is {list(shape)}, this model has {list(leaf.shape)}"
            elif dtype != name:
                problems[path] = f"{path} is {dtype}, this model has {name}"
    return problems


def load(folder: epath.Path, wanted: dict[str, Any], mesh: Mesh | None = None, partial: bool = False) -> dict[str, Any]:
    """Some parts of a checkpoint, e.g. `{"ema": abstract tree}`, checked before and after they are read.

    partial: of each part only the arrays in `wanted`, and not all it has.
    """
    empty = {name: {} for name, tree in wanted.items() if not tree}
    wanted = {name: tree for name, tree in wanted.items() if tree}
    saved = saved_shapes(folder)
    check_shapes(wanted, saved, folder)
    parts = parallel.replicate(_load(folder, parallel.spread(wanted, mesh), partial), wanted, mesh)
    if problem := _differences(parts, read_metadata(folder)["checksums"], folder, mesh):
        raise DamagedError(problem)
    return parts | empty


def _load(folder: epath.Path, wanted: dict[str, Any], partial: bool = False) -> dict[str, Any]:
    """The wanted parts, without waiting for other processes: they would wait in vain for one that finds damage."""
    _quieten()
    tree = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=partial))
    # Without a mesh: what several devices saved orbax would else want on as many again.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = lambda x: x if x.sharding else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    wanted = jax.tree.map(place, wanted)
    try:
        with ocp.Context(multiprocessing_options=_alone(), pytree_options=tree):
            return ocp.load_checkpointables(plain(folder), wanted)
    except Exception as error:  # orbax raises many kinds; all mean the files are damaged
        raise DamagedError(f"{folder}: damaged ({_one_line(error)})") from None


def _alone() -> ocp.options.MultiprocessingOptions:
    """Reading does not wait for other processes."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{me}_")


def _differences(parts, sums: dict[str, int], folder: epath.Path, mesh: Mesh | None) -> str | None:
    """What to say of arrays whose checksum is not that they were saved with; None when there are none."""
    wrong = [path for path, value in checksums(parts, mesh).items() if sums.get(path) != value]
    if not wrong:
        return None
    more = f" and {len(wrong) - 1} more arrays" if len(wrong) > 1 else ""
    return f"{folder}: damaged, {wrong[0]}{more} differ from what was saved"


def _one_line(error: BaseException, limit: int = 200) -> str:
    """The first cause, which orbax wraps in what it tried."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:limit] or type(error).__name__


def _quieten() -> None:
    """Orbax logs each step of each save, and a failure as pages of tracebacks; ours says it in one line."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    logging.getLogger().addFilter(_is_worth_telling)
    warnings.filterwarnings("ignore", message="Sharding info not provided when restoring")
    # Saves in parallel; when one fails, what the others were about to write is dropped, and asyncio says so.
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """For every array of a checkpoint of another mesh orbax logs an error, though it is told the new one."""
    return "available devices are different" not in record.getMessage()
