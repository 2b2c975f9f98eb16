"""Where the numbers of a run go: one JSON line a record, the console, TensorBoard and W&B if asked for."""

import contextlib
import itertools
import json
import math
import secrets
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lens_jax.atomic import write_json
from lens_jax.console import make_console
from lens_jax.errors import LensError
from lens_jax.run.config import LoggingConfig, ProfileConfig
from lens_jax.run.profile import Profile

# Where the console is no terminal, a progress bar shows nothing until it ends: seconds between lines in its place.
_LINE_SECONDS = 30
# Says which checkpoint was last found on disk, for the day when that disk is not there.
SAVED = "saved.json"


class Log:
    """What a run says: `config.json` and `metrics.jsonl` in its folder, lines and a progress bar on the console.

    Nothing is written before `open`. A process that is not the first says and writes nothing.
    """

    def __init__(
        self,
        out: str,
        steps: int,
        config: LoggingConfig,
        profile: ProfileConfig,
        console: Console | None = None,
    ):
        self._main = jax.process_index() == 0
        self.out, self._steps, self._config = Path(out), steps, config
        self._console = (console or make_console()) if self._main else Console(quiet=True)
        self.profile = Profile(profile, self.out, self.say)
        self._file, self._sinks, self._progress = None, [], None
        self._told = time.monotonic()

    def open(self, start_step: int, described: dict[str, Any]) -> None:
        """Begin a run, or go on with it after `start_step`; `described` has its `config`.

        The file may hold records of steps that are about to be taken again; they are removed, so that every step stands
        in it once.
        """
        if not self._main:
            return
        path = self.out / "metrics.jsonl"
        with self._writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "config.json", described["config"])
        with self._writing(path):
            if start_step == 0:
                self._keep_aside(path)
            drop_records_after(path, start_step)
            self._file = path.open("a", encoding="utf-8")
        if self._config.tensorboard:
            self._sinks.append(_TensorBoard(self.out, start_step))
        if self._config.wandb != "off":
            self._sinks.append(_Wandb(self._config, self.out, described["config"]))
        if start_step == 0:
            self.say(f"new run in {self.out}")
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False), console=self._console,
            )  # fmt: skip
            self._task = self._progress.add_task("train", total=self._steps, completed=start_step, note="")
            self._progress.start()
        self._begun = self._step = start_step
        self._started = self._told = time.monotonic()

    def advance(self, step: int) -> None:
        """A step has ended."""
        self._step = step
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def write(self, step: int, kind: str, values: dict) -> None:
        """One record. `values` are numbers, or lists or dicts of them; NaN becomes null, so the file stays JSON."""
        if not self._main:
            return
        record = {"step": step, "kind": kind, "time": round(time.time(), 3), **_plain(values)}
        with self._writing(self.out / "metrics.jsonl"):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        numbers = {f"{kind}/{name}": number for name, number in _scalars(_plain(values))}
        for sink in self._sinks:
            sink.write(step, numbers)

    def write_saved(self, step: int) -> None:
        """The checkpoint of a step is on disk, wherever that is."""
        if self._main:
            write_json(self.out / SAVED, {"step": step})

    def saved(self) -> int:
        """The newest step whose checkpoint was found on disk by an earlier start; 0 without any."""
        try:
            return int(json.loads((self.out / SAVED).read_bytes())["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def say(self, message: str) -> None:
        """A line above the progress bar."""
        self._console.print(message, markup=False)

    def note(self, text: str) -> None:
        """The text at the end of the progress bar; without a terminal a line of its own, but not for every record."""
        if not self._main:
            return
        if self._progress is not None:
            self._progress.update(self._task, note=text)
            return
        now = time.monotonic()
        if now - self._told >= _LINE_SECONDS or self._step == self._steps:
            self._told = now
            left = (now - self._started) / max(1, self._step - self._begun) * (self._steps - self._step)
            self.say(f"step {self._step} of {self._steps}  {text}  {_duration(left)} left")

    def close(self) -> None:
        """Write what there is; more than once is fine."""
        self.profile.close()
        if self._progress is not None:
            self._progress.stop()
        # A line that did not fit on the disk was reported by `write`; closing would only report it again.
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def _keep_aside(self, path: Path) -> None:
        """The records of an earlier start that came to no checkpoint belong to no step of this run."""
        if path.exists() and path.stat().st_size:
            aside = next(p for n in itertools.count(1) if not (p := path.with_name(f"metrics-{n}.jsonl")).exists())
            path.rename(aside)
            self.say(f"metrics of an earlier start, which left no checkpoint, are kept as {aside.name}")

    @contextlib.contextmanager
    def _writing(self, path: Path):
        try:
            yield
        except OSError as error:
            raise LensError(f"{path}: cannot be written: {error.strerror}") from None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _records(path: Path) -> list[tuple[str, dict]]:
    """The lines that are records, and these; what a crash or a power cut left of others is no record."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            text = line.decode("utf-8")
            record = json.loads(text)
            if type(record["step"]) is int and type(record["kind"]) is str:
                records.append((text, record))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return records


def drop_records_after(path: Path, step: int) -> None:
    """Cut the records of later steps, and a last line that a crash left unfinished."""
    if not path.exists():
        return
    kept = [line for line, record in _records(path) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def read_metrics(path: Path, kind: str) -> list[dict]:
    """The records of one kind, in order."""
    return [record for _, record in _records(path) if record["kind"] == kind]


def _plain(value):
    """Numbers, and lists and dicts of them, as JSON has them: six digits, and null for what is not finite."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list) or np.ndim(value):
        return [_plain(part) for part in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _scalars(value, name: str = "") -> list[tuple[str, float]]:
    """Every number in nested plain values, with its path: `loss_by_noise_level/0`."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return [pair for key, part in parts for pair in _scalars(part, f"{name}/{key}" if name else str(key))]
    return [(name, value)] if isinstance(value, int | float) else []


class _TensorBoard:
    """Event files, written where they are asked for.

    The thread of tensorboardX's SummaryWriter dies when the clock goes back by a month, and whoever fills its queue of
    ten events then waits for ever.
    """

    def __init__(self, run: Path, start_step: int):
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        except ImportError:
            raise LensError('logging.tensorboard needs one more package: pip install "lens-jax[tensorboard]"') from None
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder = run / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{start_step}")
        # Of a resumed run, TensorBoard drops what was written after the step that it resumes from.
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(self._event(wall_time=time.time(), step=start_step, session_log=started))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        summary = self._summary(value=values)
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Weights & Biases. The file `wandb_id` in the run folder holds the id, so a resumed run goes on there too."""

    def __init__(self, config: LoggingConfig, run: Path, described: dict):
        try:
            import wandb
        except ImportError:
            raise LensError('logging.wandb needs one more package: pip install "lens-jax[wandb]"') from None
        path = run / "wandb_id"
        if not path.exists():
            path.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=config.wandb_project,
                id=path.read_text(encoding="utf-8").strip(),
                resume="allow",
                name=run.name,
                dir=str(run),
                mode=config.wandb,
                config=described,
            )
        except wandb.Error as error:
            raise LensError(f"logging.wandb: {error}; --logging.wandb offline needs no network") from None
        # W&B drops what is logged at an earlier step than it has seen, and a killed run takes some steps again; so the
        # step is a value like others, and the axis of all of them.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()
