"""The training run, top to bottom: data, state, resume, steps, and what is saved and shown on the way."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from lens_jax import config as run_config
from lens_jax import flops
from lens_jax.config import TrainConfig
from lens_jax.console import make_console
from lens_jax.data.buckets import Bucket
from lens_jax.data.manifest import Manifest, fingerprint, load_manifest
from lens_jax.data.pipeline import batches, validation_batches
from lens_jax.errors import LensError
from lens_jax.models import codec
from lens_jax.pictures import contact_sheet
from lens_jax.pipeline import LensPipeline
from lens_jax.text.sentence import SentenceEncoder
from lens_jax.training import features
from lens_jax.training.checkpoint import CheckpointStore, Position
from lens_jax.training.metrics import MetricsLog
from lens_jax.training.optimizer import learning_rate_schedule, make_optimizer
from lens_jax.training.state import State, create_state
from lens_jax.training.step import NOISE_BINS, StepConfig, train_step, validation_losses

# Batches the codec's statistics are fitted on.
_FIT_BATCHES = 32


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: State
    # The signal that stopped it early, or None when all steps were taken.
    stopped_by: signal.Signals | None


def train(config: TrainConfig, console: Console | None = None) -> Outcome:
    """Train until `config.steps`, from where the run folder `config.out` stands.

    A run killed at any moment and started again ends with the same parameters as one that never stopped: batch n and
    the randomness of step n depend on n alone, and a checkpoint holds the rest.
    """
    console = console or make_console()
    run = Path(config.out)

    # ---- data ----------------------------------------------------------------------------------------------------
    encoder = SentenceEncoder(config.text)
    _check_widths(config, encoder)
    manifest = load_manifest(config.data.path)
    for bucket in manifest.buckets:
        codec.latent_grid(config.codec, bucket.height, bucket.width)
    to_text = functools.partial(features.encode_captions, encoder)

    # ---- state, new or resumed -----------------------------------------------------------------------------------
    with _writing(run):
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps(run_config.to_dict(config), indent=2) + "\n", encoding="utf-8")
    optimizer = make_optimizer(config.optimizer, config.steps)
    create = functools.partial(create_state, config.model, optimizer, seed=config.seed)
    store = CheckpointStore(run, config.checkpoint.keep)
    position = Position(next_step=0, fingerprint=fingerprint(manifest))
    if store.latest_step is None:
        state = jax.jit(create)(codec.fit(config.codec, _pictures(config)))
        console.print(f"new run in {run}")
    else:
        state, saved = store.restore(jax.eval_shape(create, codec.abstract_params(config.codec)))
        if saved.fingerprint != position.fingerprint:
            raise LensError(
                f"{config.data.path}: not the data set that {run} was trained on (fingerprint {position.fingerprint}, "
                f"the checkpoint has {saved.fingerprint}); use another `out` for a new run"
            )
        position = saved
        console.print(f"resuming {run} after step {int(state.step)}")

    # ---- compiled functions --------------------------------------------------------------------------------------
    step_config = StepConfig(
        config.model, config.flow, config.accumulation, config.ema_decay, config.nonfinite == "skip"
    )
    step_fn = jax.jit(functools.partial(train_step, step_config, optimizer), donate_argnums=0)
    validate_fn = jax.jit(functools.partial(validation_losses, step_config))
    learning_rate = learning_rate_schedule(config.optimizer, config.steps)

    # ---- the loop ------------------------------------------------------------------------------------------------
    start = int(state.step)
    if start >= config.steps:
        store.close()
        console.print(f"{run} is complete: {start} steps")
        return Outcome(state, None)
    log = MetricsLog(run, start, config.steps, config.logging.tensorboard, console)
    reader = batches(config.data, start_step=position.next_step, transform=to_text)
    window = _Window(config)
    stop = None
    try:
        with _StopSignals() as signals:
            pending = None
            for step in range(start + 1, config.steps + 1):
                waited = time.perf_counter()
                batch = next(reader)
                waited = time.perf_counter() - waited
                window.start(batch, waited)
                batch = features.encode_pictures(config.codec, state.codec, batch)
                state, metrics = step_fn(state, batch)
                # The device works on this step while the host reads the numbers of the one before.
                if pending is not None:
                    _report(pending, window, log, config, learning_rate)
                pending = (step, metrics)
                stop = signals.received
                events = _Events(config, step, stop is not None)
                if not events.any:
                    continue
                # What follows needs this step's state, and a state must be known to be finite before it is saved.
                _report(pending, window, log, config, learning_rate)
                pending = None
                position = dataclasses.replace(position, next_step=step)
                if events.save:
                    store.save(state, position, config, manifest.buckets)
                if events.validate:
                    loss = _validation_loss(config, state, validate_fn, to_text)
                    log.write(step, "validation", {"loss": loss})
                    log.say(f"step {step}: validation loss {loss:.4f}")
                if events.sample:
                    path = _sample_sheet(config, state, encoder, manifest, run / "samples", step)
                    log.say(f"step {step}: samples in {path}")
                window.reset_clock()
                if stop is not None:
                    break
        store.close()
    finally:
        reader.close()
        log.close()
        # What was being saved when something failed may still succeed; its own failure must not hide the first one.
        with contextlib.suppress(LensError):
            store.close()
    taken = int(state.step)
    if stop is not None and taken < config.steps:
        console.print(f"stopped by {stop.name} after step {taken}, saved; the same command goes on from there")
        return Outcome(state, stop)
    console.print(f"done: {taken} steps, checkpoint and metrics in {run}")
    return Outcome(state, None)


@dataclasses.dataclass(frozen=True)
class _Events:
    """What is due after a step. The last step does all of it; a stop only saves."""

    config: TrainConfig
    step: int
    stopping: bool

    def _due(self, every: int) -> bool:
        last = self.step == self.config.steps
        return every > 0 and not self.stopping and (self.step % every == 0 or last)

    @property
    def save(self) -> bool:
        return self.stopping or self._due(self.config.checkpoint.every)

    @property
    def validate(self) -> bool:
        return self._due(self.config.validation.every)

    @property
    def sample(self) -> bool:
        return bool(self.config.samples.prompts) and self._due(self.config.samples.every)

    @property
    def any(self) -> bool:
        return self.save or self.validate or self.sample


class _Window:
    """Sums over the steps since the last record."""

    def __init__(self, config: TrainConfig):
        self._config = config
        self.reset_clock()
        self._clear()

    def _clear(self):
        self.steps, self.images, self.operations, self.waited, self.busy = 0, 0, 0, 0.0, 0.0
        self.loss, self.bin_loss, self.bin_count = 0.0, np.zeros(NOISE_BINS), np.zeros(NOISE_BINS)

    def reset_clock(self):
        """Leave out what happened since the last step: saving, validation, sampling."""
        self._last = time.perf_counter()

    def start(self, batch: dict, waited: float) -> None:
        """Count a batch about to be dispatched."""
        count, height, width, _ = batch["pixels"].shape
        grid = codec.latent_grid(self._config.codec, height, width)
        self.images += count
        self.operations += flops.train_step(self._config.model, math.prod(grid), batch["text"][0].shape[1], count)
        self.waited += waited

    def finish(self, metrics: dict) -> None:
        """Add the numbers of a finished step."""
        now = time.perf_counter()
        self.busy, self._last = self.busy + now - self._last, now
        self.steps += 1
        self.loss += float(metrics["loss"])
        self.bin_loss += np.asarray(metrics["noise_bin_loss"])
        self.bin_count += np.asarray(metrics["noise_bin_count"])

    def record(self, metrics: dict, learning_rate: float) -> dict:
        """The window as a record; then it starts anew. A noise level nobody drew has no loss (NaN)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            by_noise = self.bin_loss / self.bin_count
        values = {
            "loss": self.loss / self.steps,
            "loss_by_noise_level": list(by_noise),
            "gradient_norm": float(metrics["gradient_norm"]),
            "update_norm": float(metrics["update_norm"]),
            "parameter_norm": float(metrics["parameter_norm"]),
            "learning_rate": learning_rate,
            "images_per_second": self.images / self.busy,
            "tflops_per_second": self.operations / self.busy / 1e12,
            "data_wait_share": self.waited / self.busy,
        }
        self._clear()
        return values


def _report(pending, window: _Window, log: MetricsLog, config: TrainConfig, learning_rate) -> None:
    """Wait for a step's numbers, stop if they are not finite, and write a record when one is due."""
    step, metrics = pending
    metrics = jax.device_get(metrics)
    window.finish(metrics)
    log.advance(step)
    if not metrics["finite"]:
        if config.nonfinite == "stop":
            raise LensError(
                f"step {step}: the loss ({float(metrics['loss']):.4g}) or the gradient norm "
                f"({float(metrics['gradient_norm']):.4g}) is not finite; nothing of this step was saved. Lower "
                "optimizer.learning_rate, or set --nonfinite skip to leave such steps out"
            )
        log.write(step, "skipped", {"loss": metrics["loss"], "gradient_norm": metrics["gradient_norm"]})
        log.say(f"step {step}: loss or gradient not finite, step skipped")
    if step % config.logging.every == 0 or step == config.steps:
        # The update of step n was taken at the schedule's value for n - 1.
        values = window.record(metrics, float(learning_rate(step - 1)))
        log.write(step, "train", values)
        log.note(
            f"loss {values['loss']:.4f}  {values['images_per_second']:.1f} images/s  "
            f"{values['tflops_per_second'] * 1e3:.3g} GFLOP/s"
        )


def _validation_loss(config: TrainConfig, state: State, validate_fn, to_text) -> float:
    """Mean loss of the moving average over the held-out split, at the same noise each time."""
    key = jax.random.key(0)
    total, count = 0.0, 0.0
    held_out = validation_batches(config.data, transform=to_text)
    for i, batch in enumerate(itertools.islice(held_out, config.validation.batches)):
        weight = batch.pop("weight")
        batch = features.encode_pictures(config.codec, state.codec, batch)
        losses = np.asarray(validate_fn(state.ema, batch, jax.random.fold_in(key, i)))
        total, count = total + float(losses @ weight), count + float(weight.sum())
    return total / count


def _sample_sheet(
    config: TrainConfig, state: State, encoder: SentenceEncoder, manifest: Manifest, folder: Path, step: int
) -> Path:
    """Draw the fixed prompts with the moving average, a row a prompt and a column a size."""
    buckets = tuple(Bucket(*parse_size(size)) for size in config.samples.sizes) or manifest.buckets
    pipe = LensPipeline(config.model, config.codec, encoder, state.ema, state.codec, default_size=(0, 0))
    columns = [
        pipe(
            list(config.samples.prompts),
            height=bucket.height,
            width=bucket.width,
            num_inference_steps=config.samples.num_inference_steps,
            guidance_scale=config.samples.guidance_scale,
            seed=config.samples.seed,
        ).images
        for bucket in buckets
    ]
    rows = [[np.asarray(image) for image in row] for row in zip(*columns)]
    with _writing(folder):
        folder.mkdir(exist_ok=True)
        path = folder / f"step_{step:07d}.png"
        contact_sheet(rows, config.samples.prompts).save(path)
    return path


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "HEIGHTxWIDTH"."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise LensError(f"size {text!r}: write HEIGHTxWIDTH, e.g. 512x768")
    return int(height), int(width)


def _pictures(config: TrainConfig) -> Iterator[np.ndarray]:
    """The pictures of the first batches, for the codec's statistics."""
    reader = batches(config.data, num_steps=_FIT_BATCHES)
    try:
        for batch in reader:
            yield batch["pixels"]
    finally:
        reader.close()


def _check_widths(config: TrainConfig, encoder: SentenceEncoder) -> None:
    """The denoiser must take what the codec and the text encoder give."""
    pairs = {
        "model.latent_channels": (config.model.latent_channels, config.codec.latent_channels, "the codec"),
        "model.text_layers": (config.model.text_layers, encoder.num_layers, "the text encoder"),
        "model.text_width": (config.model.text_width, encoder.width, "the text encoder"),
    }
    for name, (wanted, given, source) in pairs.items():
        if wanted != given:
            raise LensError(f"{name} is {wanted}, but {source} gives {given}")


@contextlib.contextmanager
def _writing(path: Path):
    try:
        yield
    except OSError as error:
        raise LensError(f"{path}: cannot be written: {error.strerror}") from None


class _StopSignals:
    """Notes SIGTERM and Ctrl-C instead of dying, so that the step in progress ends and is saved."""

    def __enter__(self):
        self.received: signal.Signals | None = None
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, frame):
        if self.received is not None:
            # Asked twice: the user does not want to wait for the save.
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
