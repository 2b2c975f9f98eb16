"""The training run, top to bottom: data, state, resume, steps, and what is saved and shown on the way."""

import contextlib
import dataclasses
import functools
import itertools
import json
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from lens_jax import config as config_files
from lens_jax import parallel
from lens_jax.console import make_console
from lens_jax.contact_sheet import contact_sheet
from lens_jax.data.buckets import Bucket
from lens_jax.data.datasets import DataSets, batch_sizes, open_data
from lens_jax.data.mixture import START, check_position
from lens_jax.data.pipeline import batches, validation_batches
from lens_jax.encoders.pixels import PixelCodecConfig
from lens_jax.encoders.text import TextFeatures
from lens_jax.errors import LensError
from lens_jax.inference.pipeline import LensPipeline
from lens_jax.pretraining import warm_start
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.features import Features, fit_codec
from lens_jax.pretraining.precompute import check_features
from lens_jax.pretraining.programs import Programs, make_programs
from lens_jax.run import store as checkpoint
from lens_jax.run.log import MetricsLog, Profile, SilentLog, Window
from lens_jax.run.optimizer import learning_rate_schedule, make_optimizer
from lens_jax.run.state import State, create_state
from lens_jax.run.store import CheckpointStore


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
    main = jax.process_index() == 0
    console = (console or make_console()) if main else Console(quiet=True)
    run = Path(config.out)
    # One device needs no mesh, and is the faster for it: nothing has to say where it lives.
    mesh = parallel.make_mesh(config.mesh) if jax.device_count() > 1 else None
    host, hosts = parallel.data_shard(mesh)

    # ---- data ----------------------------------------------------------------------------------------------------
    _check_widths(config)
    data = open_data(config.data, validation=config.validation.every > 0)
    for size in batch_sizes(config.data, data.buckets).values():
        parallel.check_batch_size(size, mesh)
    if data.features:
        for index in data.indexes:
            check_features(config, index)
    features = Features(config, data.shapes, mesh, cached=data.features is not None)
    rows = lambda size: np.arange(host * size // hosts, (host + 1) * size // hosts)
    options = {"transform": features.read, "rows": rows}

    # ---- state, new or resumed -----------------------------------------------------------------------------------
    with _writing(run):
        run.mkdir(parents=True, exist_ok=True)
        if main:
            partial = run / "config.json.partial"
            partial.write_text(json.dumps(config_files.to_dict(config), indent=2) + "\n", encoding="utf-8")
            partial.replace(run / "config.json")
    optimizer = make_optimizer(config.optimizer, config.steps)
    create = functools.partial(create_state, config.model, optimizer, seed=config.seed)
    position = START
    checkpoints = checkpoint.folder_of(config)
    abstract = parallel.abstract(create, mesh, checkpoint.abstract_codec(config), offload=config.offload)
    # A ladder, as big_vision has it: (1) a checkpoint of this run, (2) what init_from names, (3) random parameters.
    resumed = checkpoint.restore_newest(checkpoints, abstract, mesh, console.print)
    if resumed is None:
        params, codec_params = warm_start.load(config, mesh, console.print) if config.init_from else ({}, None)
        if codec_params is None:
            codec_params = parallel.of_first_process(fit_codec(config, data))
        state = parallel.create(create, mesh, codec_params, params, offload=config.offload)
        console.print(f"new run in {run}" + (f", from {config.init_from}" if config.init_from else ""))
    else:
        state, saved = resumed
        position = check_position(saved, data.fingerprints, data.order, str(run))
        console.print(f"resuming {run} after step {int(state.step)}")
    store = CheckpointStore(checkpoints, config.checkpoint, mesh)

    # ---- compiled functions --------------------------------------------------------------------------------------
    programs = Programs(*(parallel.on(mesh, program) for program in make_programs(config, optimizer)))
    # Compiled, and fetched with the step's numbers: asked for later it would wait for the step then under way.
    learning_rate = jax.jit(learning_rate_schedule(config.optimizer, config.steps))

    # ---- the loop ------------------------------------------------------------------------------------------------
    start = int(state.step)
    if start >= config.steps:
        store.close()
        console.print(f"{run} is complete: {start} steps")
        return Outcome(state, None)
    log = MetricsLog(config, start, console) if main else SilentLog()
    profile = Profile(config.profile, run, log.say)
    reader = batches(data, position, **options)
    window = Window(config, features.counts, hosts)
    stop, prompts = None, None
    try:
        with _StopSignals() as signals:
            pending = None
            for step in range(start + 1, config.steps + 1):
                profile.begin(step)
                totals = programs.empty_totals(state.params) if config.accumulation > 1 else None
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    for micro in range(config.accumulation):
                        waited = time.perf_counter()
                        batch = next(reader)
                        waited = time.perf_counter() - waited
                        window.start(batch, waited)
                        batch = features.encode(state.codec, batch)
                        if totals is not None:
                            totals = programs.micro_step(state, totals, batch, micro)
                    if totals is None:
                        state, metrics = programs.train_step(state, batch)
                    else:
                        state, metrics = programs.update(state, totals)
                # The update of step n is taken at the schedule's value for n - 1.
                metrics["learning_rate"] = learning_rate(step - 1)
                if jax.process_count() > 1:
                    metrics["stop"] = parallel.largest(signals.received or 0, mesh)
                # The device works on this step while the host reads the numbers of the one before.
                if pending is not None:
                    _report(pending, window, log, config)
                # Hosts are told to stop at different moments: all of them act on what they agreed on a step ago.
                stop = signals.received
                if jax.process_count() > 1:
                    agreed = int(pending[1]["stop"]) if pending else 0
                    stop = signal.Signals(agreed) if agreed else None
                pending = (step, metrics)
                events = _Events(config, step, stop is not None)
                if not (events.any or profile.ends(step)):
                    continue
                # What follows needs this step's state, and a state must be known to be finite before it is saved.
                _report(pending, window, log, config)
                pending = None
                profile.end(step)
                if events.save:
                    store.save(state, reader.position, config, data.buckets)
                if events.validate:
                    held_out = validation_batches(data, config.validation.batches, **options)
                    held_out = map(functools.partial(features.encode, state.codec), held_out)
                    average = parallel.on_device(state.ema, mesh)
                    loss = _validation_loss(config, average, programs.validation_loss, held_out)
                    # Of an average that is offloaded it is a copy, which must not stay beside the steps that follow.
                    del average
                    log.write(step, "validation", {"loss": loss})
                    log.say(f"step {step}: validation loss {loss:.4f}")
                if events.sample:
                    # All hosts take part up to here; the first one draws.
                    prompts = prompts or features.prompts(config.samples.prompts)
                    trees = parallel.on_device(state.ema, mesh), features.codec_params(state.codec)
                    ema, codec_params = (parallel.local_copy(tree, mesh) for tree in trees)
                    if main:
                        buckets = _sample_sizes(config, data)
                        path = _sample_sheet(config, ema, codec_params, prompts, buckets, run / "samples", step)
                        log.say(f"step {step}: samples in {path}")
                    # These are whole copies, which must not stay either.
                    del trees, ema, codec_params
                window.reset_clock()
                if stop is not None:
                    break
        store.close()
    except (jax.errors.JaxRuntimeError, KeyboardInterrupt):
        # Another process is gone, and with it what would complete a save; or the user will not wait.
        store.abandon()
        raise
    finally:
        reader.close()
        profile.close()
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


def _report(pending, window: Window, log: MetricsLog, config: TrainConfig) -> None:
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
        values = window.record(metrics)
        log.write(step, "train", values)
        mfu = f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
        log.note(
            f"loss {values['loss']:.4f}  {values['images_per_second']:.1f} images/s  "
            f"{values['tflops_per_second'] * 1e3:.3g} GFLOP/s{mfu}"
        )


def _validation_loss(config: TrainConfig, ema: dict, validate_fn, held_out: Iterator[dict]) -> float:
    """Mean loss of the moving average over the held-out split, at the same noise each time."""
    key = jax.random.key(0)
    total, count = 0.0, 0.0
    for i, batch in enumerate(itertools.islice(held_out, config.validation.batches)):
        loss, weight = jax.device_get(validate_fn(ema, batch, jax.random.fold_in(key, i)))
        total, count = total + float(loss), count + float(weight)
    return total / count


def _sample_sizes(config: TrainConfig, data: DataSets) -> Sequence[Bucket]:
    return tuple(Bucket(*parse_size(size)) for size in config.samples.sizes) or data.buckets


def _sample_sheet(
    config: TrainConfig,
    ema: dict,
    codec_params: dict,
    prompts: TextFeatures,
    buckets: Sequence[Bucket],
    folder: Path,
    step: int,
) -> Path:
    """Draw the fixed prompts with the moving average, a row a prompt and a column a size."""
    image_codec = config.codec if isinstance(config.codec, PixelCodecConfig) else config.codec.model
    pipe = LensPipeline(config.model, image_codec, None, ema, codec_params, default_size=(0, 0))
    columns = [
        pipe(
            prompt_embeds=prompts,
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


def _check_widths(config: TrainConfig) -> None:
    """The denoiser must take what the codec and the text encoder give."""
    pairs = {
        "model.latent_channels": (config.model.latent_channels, config.codec.latent_channels, "the codec"),
        "model.text_layers": (config.model.text_layers, config.text.num_layers, "the text encoder"),
        "model.text_width": (config.model.text_width, config.text.width, "the text encoder"),
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
