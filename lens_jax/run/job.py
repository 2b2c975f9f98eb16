"""What an algorithm supplies to be run: the contract between a job and the loop."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from lens_jax.parallel import Rules
from lens_jax.run.config import CheckpointConfig, LoggingConfig, ProfileConfig
from lens_jax.run.state import State


class RunConfig(Protocol):
    """What the loop reads of a job's config."""

    # Folder of the run.
    out: str
    # Optimiser steps in all.
    steps: int
    # What a loss or gradient that is not finite does: "stop" ends the run, "skip" leaves the update out.
    nonfinite: str
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    profile: ProfileConfig


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that is done after some of the steps, by all processes."""

    # After every so many steps and after the last one; 0 never.
    every: int
    # (state, step, log) -> nothing. The log of a process that is not the first says and writes nothing.
    act: Callable[[State, int, Any], None]

    def due(self, step: int, last: int) -> bool:
        """Whether it is done after a step of a run whose last one is `last`."""
        return self.every > 0 and (step % self.every == 0 or step == last)


class Batches(Protocol):
    """An iterator over batches that knows where it stands."""

    def __next__(self) -> dict: ...

    @property
    def position(self) -> dict[str, Any]:
        """After the batches that were given, as plain JSON."""

    def close(self) -> None:
        """Stop reading ahead."""


class Meter(Protocol):
    """What a job counts of its steps, between two records."""

    def add(self, metrics: dict[str, Any]) -> None:
        """The numbers of the oldest step that was dispatched and not added, on the host."""

    def record(self, seconds: float) -> dict[str, Any]:
        """What was added since the last record, which took so long, as numbers or lists or dicts of them."""

    def note(self, values: dict[str, Any]) -> str:
        """A few of the record's numbers for the end of the progress bar."""


class Job(Protocol):
    """An algorithm on a mesh. Its functions are called by all processes alike."""

    # Names it in checkpoints: "pretraining".
    kind: str
    config: RunConfig
    # The sharding rules of every named tree of its state.
    rules: Rules
    meter: Meter
    events: Sequence[Event]

    def check(self) -> None:
        """LensError for anything that a later step or event would fail at. Nothing is written yet."""

    def create(self) -> State:
        """The state of a new run."""

    def abstract(self) -> State:
        """Shapes, dtypes and layouts of that state, to restore a checkpoint into."""

    def parts(self, state: State) -> dict[str, Any]:
        """What a checkpoint keeps of a state (see `state.to_parts`)."""

    def resume(self, parts: dict[str, Any]) -> State:
        """The state of which `parts` were kept."""

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says besides, as plain JSON: `config` at least."""

    def batches(self, position: dict[str, Any] | None) -> Batches:
        """The batches from a position on; None is the start. LensError where it is one in other data."""

    def step(self, state: State, batches: Iterator[dict]) -> tuple[State, dict[str, Any]]:
        """Dispatch one optimiser step with as many batches as it needs: the next state, and what `update` logs.

        It must not wait for the devices. `metrics` has at least `loss`, `gradient_norm`, `learning_rate` and `finite`.
        """
