"""What every run has in its config, whatever it trains: when it saves, what it reports, which steps it traces."""

import dataclasses
from typing import Any, Literal

from lens_jax.errors import LensError


def at_least(prefix: str, config: Any, **least: int) -> None:
    """LensError for a field of `config` that is below its least value; `prefix` is what comes before its name."""
    for name, number in least.items():
        if getattr(config, name) < number:
            raise LensError(f"{prefix}{name} is {getattr(config, name)}; it must be at least {number}")


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
    # Folder of the checkpoints, which all processes must see: a path, from OUT where it is relative, or gs://BUCKET/...
    # (pip install "lens-jax[gcs]"). Empty is OUT/checkpoints. All else a run writes stays in OUT.
    path: str = ""
    # What is read back of a checkpoint before it counts and older ones are deleted: its index, with every array's shape
    # and the lengths of the files it points to, or all contents too. Those need the devices' memory for the largest
    # part (opt_state) once more, and the time to read all of it.
    verify: Literal["index", "contents"] = "index"

    def __post_init__(self):
        at_least("checkpoint.", self, every=1, keep=1, keep_every=0)
        scheme, address, _ = self.path.partition("://")
        if address and scheme != "gs":
            # Orbax takes every other address for a relative path.
            raise LensError(f"checkpoint.path is {self.path!r}; accepted: a folder (a mounted bucket too), or gs://...")


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

    def __post_init__(self):
        at_least("logging.", self, every=1)


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A profiler trace of some steps, in the folder `profile` of the run."""

    # First step traced. Programs are compiled in the first steps, one for each number of image tokens.
    start: int = 10
    # Steps traced; 0 traces none. Three are enough to see where the time goes, and a trace of many is slow to open.
    steps: int = 0

    def __post_init__(self):
        at_least("profile.", self, start=1, steps=0)
