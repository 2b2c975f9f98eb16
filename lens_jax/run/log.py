"""What a run measures, and where it goes: one JSON line a record, the console, TensorBoard and W&B if asked for."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import resource
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lens_jax import config as config_files
from lens_jax import flops
from lens_jax.data.mixture import Shape
from lens_jax.errors import LensError
from lens_jax.models import attention
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.tokens import Tokens
from lens_jax.run.config import ProfileConfig
from lens_jax.run.step import NOISE_BINS


@dataclasses.dataclass(frozen=True)
class Work:
    """What one optimiser step has to do, over all hosts."""

    # Size of its images, HEIGHTxWIDTH.
    bucket: str
    images: int
    # Image and text tokens that mean something, and all that are computed on.
    tokens: float
    computed_tokens: int
    # Model operations on the former, and what the devices are given to do.
    operations: float
    computed_operations: float


def work(config: TrainConfig, counts: dict[Shape, Tokens], batch: dict, hosts: int = 1) -> Work:
    """Exact counts for one of `hosts` equal parts of a batch (`bucket`, `text_lengths`), scaled to the whole.

    Captions are dropped on the device, which does not say how many, so the expected number is counted as padding.
    """
    shape = Shape.of(batch)
    tokens, lengths = counts[shape], np.asarray(batch["text_lengths"])
    count, image = len(lengths), tokens.image
    operations = lambda text, images: flops.train_step(config.model, image, text, images)
    captioned = sum(operations(int(n), int(images)) for n, images in zip(*np.unique(lengths, return_counts=True)))
    dropped = config.flow.caption_dropout
    images = count * hosts
    kernel = attention.resolve(config.model.attention, config.model.dtype, jax.default_backend())
    model = dataclasses.replace(config.model, attention=kernel)
    computed = model, tokens.padded, tokens.text, images
    return Work(
        bucket=str(shape.bucket),
        images=images,
        tokens=images / count * (image * count + (1 - dropped) * int(lengths.sum())),
        computed_tokens=images * (tokens.padded + tokens.text),
        operations=images / count * ((1 - dropped) * captioned + dropped * operations(0, count)),
        computed_operations=flops.train_step(*computed) + flops.recomputation(*computed),
    )


class Window:
    """Sums over the steps since the last record.

    Batches are counted when they are dispatched, and enter the sums when their step has finished: by then the next
    one has been dispatched too.
    """

    def __init__(self, config: TrainConfig, counts: dict[Shape, Tokens], hosts: int = 1):
        self._config, self._counts, self._hosts = config, counts, hosts
        self._dispatched: collections.deque[Work] = collections.deque()
        self.reset_clock()
        self._clear()

    def _clear(self):
        self.done: list[Work] = []
        self.waited, self.busy = 0.0, 0.0
        self.losses: list[float] = []
        self.by_bucket: dict[str, list[float]] = collections.defaultdict(list)
        self.bin_loss, self.bin_count = np.zeros(NOISE_BINS), np.zeros(NOISE_BINS)

    def reset_clock(self):
        """Leave out what happened since the last step: saving, validation, sampling."""
        self._last = time.perf_counter()

    def start(self, batch: dict, waited: float) -> None:
        """Count a batch about to be dispatched, which the loop waited for so many seconds."""
        self._dispatched.append(work(self._config, self._counts, batch, self._hosts))
        self.waited += waited

    def finish(self, metrics: dict) -> None:
        """Add the numbers of the oldest unfinished step. Those of a step that is skipped for them are left out."""
        now = time.perf_counter()
        self.busy, self._last = self.busy + now - self._last, now
        done = [self._dispatched.popleft() for _ in range(self._config.accumulation)]
        self.done += done
        if metrics["finite"]:
            self.losses.append(float(metrics["loss"]))
            for part, loss in zip(done, np.asarray(metrics["losses"])):
                self.by_bucket[part.bucket].append(float(loss))
            self.bin_loss += np.asarray(metrics["noise_bin_loss"])
            self.bin_count += np.asarray(metrics["noise_bin_count"])

    def record(self, metrics: dict) -> dict:
        """The window as a record; then it starts anew. A noise level nobody drew has no loss (NaN)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            by_noise = self.bin_loss / self.bin_count
        values = {
            "loss": float(np.mean(self.losses)) if self.losses else math.nan,
            "loss_by_noise_level": list(by_noise),
            "loss_by_bucket": {bucket: float(np.mean(self.by_bucket[bucket])) for bucket in sorted(self.by_bucket)},
            **{
                name: float(metrics[name])
                for name in ("gradient_norm", "update_norm", "parameter_norm", "learning_rate")
            },
            **speed(self.done, self.busy),
            "data_wait_share": self.waited / self.busy,
            **memory(),
        }
        self._clear()
        return values


def speed(done: list[Work], seconds: float) -> dict[str, float]:
    """Throughput of these steps. Shares of the peak only where it is known.

    MFU counts the trained network's operations on real tokens; HFU also padding and recomputation.
    """
    total = lambda name: sum(getattr(step, name) for step in done)
    devices, peak = jax.device_count(), flops.peak(jax.devices()[0].device_kind)
    rate = total("operations") / seconds
    values = {
        "images_per_second": total("images") / seconds,
        "tokens_per_second": total("tokens") / seconds,
        "tflops_per_second": rate / 1e12,
        "tflops_per_second_per_device": rate / devices / 1e12,
        "padding_share": 1 - total("tokens") / total("computed_tokens"),
    }
    if peak:
        values["mfu"] = rate / devices / peak
        values["hfu"] = total("computed_operations") / seconds / devices / peak
    return values


def memory() -> dict[str, float]:
    """Gigabytes (1e9): most in use so far on the fullest device of this host, if devices tell; now in this process."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    on_device = {"device_memory_peak_gb": max(peaks) / 1e9} if peaks and None not in peaks else {}
    return {**on_device, "process_memory_gb": _resident_bytes() / 1e9}


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux: the most there was, which macOS gives in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Profile:
    """A trace of the steps [start, start + steps), written by process 0 into the folder `profile` of the run."""

    def __init__(self, config: ProfileConfig, run: Path, say: Callable[[str], None]):
        self._steps = range(config.start, config.start + config.steps) if jax.process_index() == 0 else range(0)
        self._folder, self._say = run / "profile", say
        self._traced: list[int] = []
        self._wrote = False

    def begin(self, step: int) -> None:
        """Before a step: start the trace if the window has been reached. A resumed run may enter it in the middle."""
        if step not in self._steps:
            return
        if not self._traced:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
        self._traced.append(step)

    def ends(self, step: int) -> bool:
        """Whether a step is the last of the trace."""
        return bool(self._traced) and step == self._steps[-1]

    def end(self, step: int) -> None:
        """After a step has finished on the device: write the trace if it was the last one."""
        if self.ends(step):
            self._write()

    def close(self) -> None:
        """Write what there is when the run stops inside the window; its own failure must not hide the run's."""
        with contextlib.suppress(RuntimeError, OSError):
            if self._traced:
                self._write()
        if self._steps and not self._wrote:
            self._say(f"nothing traced: none of the steps {self._steps[0]} to {self._steps[-1]} was taken here")

    def _write(self) -> None:
        first, last = self._traced[0], self._traced[-1]
        self._traced, self._wrote = [], True
        jax.profiler.stop_trace()
        self._say(
            f"steps {first} to {last} traced in {self._folder}: open its perfetto_trace.json.gz at ui.perfetto.dev, "
            f"or pip install xprof and run xprof --logdir {self._folder}"
        )


class SilentLog:
    """What a process that is not the first has in place of `MetricsLog`."""

    def advance(self, step: int) -> None:
        pass

    def write(self, step: int, kind: str, values: dict) -> None:
        pass

    def say(self, message: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class MetricsLog:
    """Appends to `metrics.jsonl`, shows a progress bar, and writes to TensorBoard and W&B when asked to.

    After a resume the file may hold records of steps that are about to be taken again; they are cut, so that every
    step stands in the file once.
    """

    def __init__(self, config: TrainConfig, start_step: int, console: Console):
        run = Path(config.out)
        self._path = run / "metrics.jsonl"
        with self._writing():
            drop_records_after(self._path, start_step)
            self._file = self._path.open("a", encoding="utf-8")
        self._sinks: list = []
        if config.logging.tensorboard:
            self._sinks.append(_TensorBoard(run, start_step))
        if config.logging.wandb != "off":
            self._sinks.append(_Wandb(config))
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
        )  # fmt: skip
        self._task = self._progress.add_task("train", total=config.steps, completed=start_step, note="")
        self._progress.start()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def write(self, step: int, kind: str, values: dict) -> None:
        """One record. `values` are numbers, or lists or dicts of them; NaN becomes null, so the file stays JSON."""
        record = {"step": step, "kind": kind, "time": round(time.time(), 3), **_plain(values)}
        with self._writing():
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        numbers = {f"{kind}/{name}": number for name, number in _scalars(_plain(values))}
        for sink in self._sinks:
            sink.write(step, numbers)

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
        for sink in self._sinks:
            sink.close()

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

    def __init__(self, config: TrainConfig):
        try:
            import wandb
        except ImportError:
            raise LensError('logging.wandb needs one more package: pip install "lens-jax[wandb]"') from None
        run = Path(config.out)
        path = run / "wandb_id"
        if not path.exists():
            path.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=config.logging.wandb_project,
                id=path.read_text(encoding="utf-8").strip(),
                resume="allow",
                name=run.name,
                dir=str(run),
                mode=config.logging.wandb,
                config=config_files.to_dict(config),
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
