"""A run, described by frozen dataclasses; configs/ holds one python file a run.

Every field can be set from the command line (`--optimizer.learning-rate 1e-4`), and the resolved config is saved with
each checkpoint, from which `from_dict` reads it back.
"""

import dataclasses
import importlib
import pkgutil
import runpy
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lens_jax.data.pipeline import DataConfig
from lens_jax.diffusion.flow import FlowConfig
from lens_jax.errors import LensError, nearest
from lens_jax.models.codec import PixelCodecConfig
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.sharding import MeshConfig
from lens_jax.text.sentence import SentenceEncoderConfig
from lens_jax.training.frozen import FluxCodecConfig, GptOssTextConfig
from lens_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved."""

    # Save after every so many optimiser steps, and always at the end and when told to stop.
    every: int = 1000
    # Newest checkpoints kept; older ones are deleted.
    keep: int = 3
    # Also keep, for good, the checkpoint of every step that is a multiple of this, which should be one of `every`; 0
    # keeps none.
    keep_every: int = 0
    # Folder of the checkpoints, which all processes must see: a path, or gs://BUCKET/... (pip install "lens-jax[gcs]").
    # Empty is OUT/checkpoints. All else a run writes stays in OUT.
    path: str = ""

    def __post_init__(self):
        scheme, address, _ = self.path.partition("://")
        if address and scheme != "gs":
            # Orbax takes every other address for a relative path.
            raise LensError(f"checkpoint.path is {self.path!r}; accepted: a folder (a mounted bucket too), or gs://...")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Sheets of samples drawn from the moving average while training, from fixed noise."""

    # Draw after every so many steps; 0 draws none.
    every: int = 5000
    # One row a prompt.
    prompts: tuple[str, ...] = ()
    # One column a size, HEIGHTxWIDTH; empty means every bucket of the data set.
    sizes: tuple[str, ...] = ()
    # Euler steps.
    num_inference_steps: int = 20
    # Guidance; 1 turns it off.
    guidance_scale: float = 5.0
    # Seed of the noise.
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """The loss of the moving average on held-out data, at fixed noise."""

    # Measure after every so many steps; 0 never does.
    every: int = 1000
    # Most batches used.
    batches: int = 16


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What is reported, and how often."""

    # Steps between records in metrics.jsonl and on the console.
    every: int = 50
    # Also write TensorBoard events (pip install "lens-jax[tensorboard]").
    tensorboard: bool = False
    # Also send to Weights & Biases (pip install "lens-jax[wandb]"); offline keeps it in OUT/wandb for `wandb sync`.
    wandb: Literal["off", "online", "offline"] = "off"
    # Project there. The account is the one `wandb login` or WANDB_API_KEY gives.
    wandb_project: str = "lens-jax"


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A profiler trace of some steps, in the folder `profile` of the run."""

    # First step traced. Programs are compiled in the first steps, one for each number of image tokens.
    start: int = 10
    # Steps traced; 0 traces none. Three are enough to see where the time goes, and a trace of many is slow to open.
    steps: int = 0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    # Folder of the run: checkpoints, metrics and samples. A run that is there already goes on where it stopped.
    out: str = "runs/lens"
    # Optimiser steps in all.
    steps: int = 400_000
    # Batches (micro-steps) summed into one update; their buckets, and so their areas, are mixed.
    accumulation: int = 1
    # What a batch counts in an update: as much as any other, which is what the report's ranks do, or by its images.
    weighting: Literal["batch", "image"] = "batch"
    # Decay of the moving average of the parameters, which is what is sampled.
    ema_decay: float = 0.9999
    # Keep the average and the optimiser's moments, 12 bytes a parameter, in the host's memory, and copy them to the
    # devices and back in each update: for few devices and many micro-steps.
    offload: bool = False
    # Root of all randomness.
    seed: int = 0
    # What a new run starts from, instead of random parameters: a run or one of its checkpoints, a release folder or its
    # conversion, or a file of weights. A run that is there already goes on from its own checkpoint.
    init_from: str = ""
    # Of a run: its moving average, or the parameters themselves.
    init_part: Literal["ema", "params"] = "ema"
    # Take what fits and leave the rest random, instead of refusing what does not fit in every array.
    init_partial: bool = False
    # Of several processes: seconds without a sign of life after which one counts as dead, and the others end.
    heartbeat_seconds: int = 100
    # A loss that is not finite ends the run before it is saved, or its step is skipped.
    nonfinite: Literal["stop", "skip"] = "stop"
    model: DenoiserConfig = DenoiserConfig()
    codec: PixelCodecConfig | FluxCodecConfig = PixelCodecConfig()
    text: SentenceEncoderConfig | GptOssTextConfig = SentenceEncoderConfig()
    flow: FlowConfig = FlowConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    samples: SampleConfig = SampleConfig()
    validation: ValidationConfig = ValidationConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig = ProfileConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        for name in ("steps", "accumulation", "heartbeat_seconds"):
            if getattr(self, name) < 1:
                raise LensError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, value in (
            ("checkpoint.every", self.checkpoint.every),
            ("checkpoint.keep", self.checkpoint.keep),
            ("logging.every", self.logging.every),
            ("profile.start", self.profile.start),
        ):
            if value < 1:
                raise LensError(f"{name} is {value}; it must be at least 1")
        for name, value in (
            ("profile.steps", self.profile.steps),
            ("checkpoint.keep_every", self.checkpoint.keep_every),
        ):
            if value < 0:
                raise LensError(f"{name} is {value}; it must be 0 or more")
        if not 0 <= self.ema_decay < 1:
            raise LensError(f"ema_decay is {self.ema_decay}; it must be at least 0 and below 1")


def available() -> list[str]:
    """Names of the configs that come with the package."""
    import lens_jax.configs

    return sorted(module.name for module in pkgutil.iter_modules(lens_jax.configs.__path__))


def load(name: str) -> TrainConfig:
    """The `config` of a python file, given as a path or as the name of one that comes with the package."""
    path = Path(name)
    if path.suffix == ".py" or path.exists():
        if not path.is_file():
            raise LensError(f"{name}: no such config file")
        try:
            config = runpy.run_path(str(path)).get("config")
        except SyntaxError as error:
            raise LensError(f"{name}:{error.lineno}: {error.msg}") from None
        except LensError as error:
            raise LensError(f"{name}: {error}") from None
        except Exception as error:  # a config is a program: whatever it raises is the user's to see
            raise LensError(f"{name}: {type(error).__name__}: {error}") from None
    elif name in available():
        config = importlib.import_module(f"lens_jax.configs.{name}").config
    else:
        raise LensError(
            f"no config {name!r}{nearest(name, available())}; accepted: {', '.join(available())}, or a .py file"
        )
    if not isinstance(config, TrainConfig):
        raise LensError(f"{name}: it must define `config`, a lens_jax.config.TrainConfig")
    return config


def to_dict(config) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: Mapping[str, Any], where: str, prefix: str = "") -> Any:
    """A config back from JSON values, each checked against its type; LensError names the field."""
    if not isinstance(values, Mapping):
        raise LensError(f"{where}: {prefix or 'the config'} must be an object")
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise LensError(f"{where}: unknown field {prefix}{name}{nearest(name, fields)}")
    try:
        return cls(**{k: _value(hints[k], v, where, f"{prefix}{k}") for k, v in values.items()})
    except LensError as error:
        raise error if str(error).startswith(where) else LensError(f"{where}: {error}") from None


def _value(hint, value, where: str, name: str):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where, f"{name}.")
    if origin is tuple and isinstance(value, list | tuple):
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(inner) == len(value):
            return tuple(_value(h, v, where, f"{name}[{i}]") for i, (h, v) in enumerate(zip(inner, value)))
    elif origin is Literal and value in args:
        return value
    elif origin in (typing.Union, types.UnionType):
        kinds = [option for option in args if dataclasses.is_dataclass(option)]
        if kinds and isinstance(value, Mapping):
            # The kind whose fields it has, so that a message is about the field that is wrong.
            fields = lambda kind: {field.name for field in dataclasses.fields(kind)}
            return _value(max(kinds, key=lambda kind: len(fields(kind) & set(value))), value, where, name)
        for option in args:
            try:
                return _value(option, value, where, name)
            except LensError:
                continue
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    elif hint is type(None) and value is None:
        return None
    raise LensError(f"{where}: {name} is {value!r:.80}; expected {getattr(hint, '__name__', hint)}")
