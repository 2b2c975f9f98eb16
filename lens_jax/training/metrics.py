"""What a run reports: one JSON line a record, a console line, and TensorBoard if asked for."""

import contextlib
import json
import math
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lens_jax.errors import LensError


class MetricsLog:
    """Appends to `metrics.jsonl`, shows a progress bar, and writes TensorBoard events when asked to.

    After a resume the file may hold records of steps that are about to be taken again; they are cut, so that every
    step stands in the file once.
    """

    def __init__(self, run: Path, start_step: int, total_steps: int, tensorboard: bool, console: Console):
        self._path = run / "metrics.jsonl"
        with self._writing():
            drop_records_after(self._path, start_step)
            self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard_writer(run, start_step) if tensorboard else None
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
        )  # fmt: skip
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step, note="")
        self._progress.start()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def write(self, step: int, kind: str, values: dict) -> None:
        """One record. `values` are numbers, or lists of numbers; NaN becomes null, so the file stays JSON."""
        record = {"step": step, "kind": kind, "time": round(time.time(), 3), **_plain(values)}
        with self._writing():
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        if self._tensorboard:
            for name, value in record.items():
                for suffix, number in _scalars(value):
                    if name not in ("step", "time"):
                        self._tensorboard.add_scalar(f"{kind}/{name}{suffix}", number, step)

    def say(self, message: str) -> None:
        """A line above the progress bar."""
        self._progress.console.print(message)

    def note(self, text: str) -> None:
        """The text at the end of the progress bar."""
        self._progress.update(self._task, note=text)

    def close(self) -> None:
        self._progress.stop()
        # A line that did not fit on the disk was reported by `write`; closing would only report it again.
        with contextlib.suppress(OSError):
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise LensError(f"{self._path}: cannot be written: {error.strerror}") from None


def drop_records_after(path: Path, step: int) -> None:
    """Cut the records of later steps, and a last line that a crash left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def read_metrics(path: Path, kind: str) -> list[dict]:
    """The records of one kind, in order."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["kind"] == kind]


def _plain(values: dict) -> dict:
    def number(x):
        x = x.item() if hasattr(x, "item") else x
        if isinstance(x, float):
            return float(f"{x:.6g}") if math.isfinite(x) else None
        return x

    return {
        name: [number(x) for x in value] if isinstance(value, list | np.ndarray) and np.ndim(value) else number(value)
        for name, value in values.items()
    }


def _scalars(value):
    if isinstance(value, list):
        return [(f"/{i}", x) for i, x in enumerate(value) if isinstance(x, int | float)]
    return [("", value)] if isinstance(value, int | float) else []


def _tensorboard_writer(run: Path, start_step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise LensError('logging.tensorboard needs one more package: pip install "lens-jax[tensorboard]"') from None
    return SummaryWriter(str(run / "tensorboard"), purge_step=start_step)
