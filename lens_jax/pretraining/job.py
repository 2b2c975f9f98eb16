"""Pre-training, and fine-tuning of all parameters or by an adapter, as a job of the loop in `run`."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from rich.console import Console

from lens_jax import config as config_files
from lens_jax import parallel
from lens_jax.data.buckets import parse_bucket
from lens_jax.data.datasets import open_data, repetition
from lens_jax.data.mixture import START, Position
from lens_jax.data.pipeline import Batches, batches, validation_batches
from lens_jax.models.latent_grid import latent_grid
from lens_jax.pretraining import warm_start
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.features import Features, fit_codec
from lens_jax.pretraining.loss import networks
from lens_jax.pretraining.meter import Meter
from lens_jax.pretraining.precompute import check_features
from lens_jax.pretraining.recipe import (
    RULES,
    abstract_state,
    check_widths,
    create_state,
    make_programs,
    make_validation_program,
)
from lens_jax.pretraining.sheet import draw_sheet, save_sheet
from lens_jax.pretraining.start import start
from lens_jax.run import loop
from lens_jax.run.job import Event
from lens_jax.run.log import Log
from lens_jax.run.state import State, from_parts, to_parts
from lens_jax.run.step import Batch


def train(config: TrainConfig, console: Console | None = None) -> loop.Outcome:
    """Train until `config.steps`, from where the run folder `config.out` stands."""
    return start(config, Pretraining, console)


class Pretraining:
    """A `run.job.Job`: params {"denoiser"}, frozen {"codec"} where that is fitted to the data and not released.

    With `config.lora` params {"lora"} and frozen {"denoiser"} too, which checkpoints leave out: it is read again from
    `init_from`, and must be what the run began with.
    """

    kind = "pretraining"
    rules = RULES

    def __init__(self, config: TrainConfig, mesh: Mesh | None, log: Log):
        self.config, self._mesh, self._log = config, mesh, log
        self._rows = functools.partial(parallel.rows_of_host, mesh)
        self._data = open_data(config.data, validation=config.validation.every > 0)
        self._programs = jax.tree.map(functools.partial(parallel.on, mesh), make_programs(config))
        self._validation_loss = parallel.on(mesh, make_validation_program(config))
        self._totals = None
        self._draws = config.samples.every > 0 and bool(config.samples.prompts)
        self.events = (
            Event(config.validation.every, self._validate),
            Event(config.samples.every if self._draws else 0, self._draw_sheet),
        )

    def check(self) -> None:
        """Loads the frozen networks as well, which is where theirs are checked."""
        config, data = self.config, self._data
        check_widths(config)
        warm_start.check(config)
        if line := repetition(data):
            self._log.say(line)
        for size in data.sizes(data.feeds("train")[0]).values():
            parallel.check_batch_size(size, self._mesh)
        if data.features:
            check_features(config, data.indexes[0])
        for size in self._sheet_sizes if self._draws else ():
            latent_grid(config.codec, size.height, size.width)
        self._features = Features(config, data.shapes, self._mesh, cached=data.features is not None)
        self.meter = Meter(config, self._features.counts, functools.partial(parallel.global_rows, self._mesh))
        if self._draws:
            # What loads the encoders or refuses a prompt must not wait for the first sheet.
            self._prompts, self._features.codec_params({})

    def abstract(self) -> State:
        return abstract_state(self.config, self._mesh, self.config.offload)

    def create(self) -> State:
        # A ladder, as big_vision has it: what init_from names, or random parameters.
        config = self.config
        params, fitted = warm_start.load(config, self._mesh, self._log.say) if config.init_from else ({}, None)
        if fitted is None:
            fitted = parallel.of_first_process(fit_codec(config, self._data))
        create = functools.partial(create_state, config)
        if config.init_from:
            self._log.say(f"starting from {config.init_from}")
        state = parallel.create(create, RULES, self._mesh, fitted, params, offload=config.offload)
        return state.replace(extra=warm_start.mark(state.frozen["denoiser"], self._mesh)) if config.lora.rank else state

    def parts(self, state: State) -> dict[str, Any]:
        rest = {name: tree for name, tree in state.frozen.items() if name != "denoiser"}
        return to_parts(state.replace(frozen=rest))

    def resume(self, parts: dict[str, Any]) -> State:
        # What is no array is the same in the description.
        state = from_parts(parts, self.abstract())
        if not self.config.lora.rank:
            return state
        params, _ = warm_start.load(self.config, self._mesh, self._log.say)
        base = unflatten_dict(params, sep="/")
        warm_start.check_mark(state.extra, base, self._mesh, f"init_from {self.config.init_from}", self.config.out)
        return state.replace(frozen={**parts.get("frozen", {}), "denoiser": base})

    def meta(self) -> dict[str, Any]:
        """The config, the sizes it was trained on, and how it is drawn by default: as its sheets are."""
        sizes = [[size.height, size.width] for size in self._data.buckets]
        sampling = self.config.samples.sampling()
        return {"config": config_files.to_dict(self.config), "sizes": sizes, "sampling": sampling}

    def batches(self, position: dict[str, Any] | None) -> "DataBatches":
        at = START if position is None else Position.from_json(position, f"the checkpoints of {self.config.out}")
        return DataBatches(batches(self._data, at, transform=self._features.read, rows=self._rows))

    def step(self, state: State, batches: Iterator[dict]) -> tuple[State, dict[str, Any]]:
        programs = self._programs
        if self.config.accumulation == 1:
            return programs.train_step(state, self._next(state, batches))
        for micro in range(self.config.accumulation):
            batch = self._next(state, batches)
            if self._totals is None:
                self._totals = programs.empty_totals(state, batch)
            self._totals = programs.micro_step(state, self._totals, batch, micro)
        state, self._totals, metrics = programs.update(state, self._totals)
        return state, metrics

    def _next(self, state: State, batches: Iterator[dict]) -> Batch:
        batch = next(batches)
        self.meter.dispatch(batch)
        return self._features.encode(state.frozen.get("codec", {}), batch)

    def _validate(self, state: State, step: int, log: Log) -> None:
        """The loss of the moving average on the held-out split, at the same noise each time, by size."""
        average = parallel.on_device(state.ema, self._mesh)
        key, sums = jax.random.key(0), {}
        held_out = validation_batches(
            self._data, self.config.validation.batches, transform=self._features.read, rows=self._rows
        )
        try:
            for i, batch in enumerate(held_out):
                size = "{}x{}".format(*batch["bucket"])
                batch = self._features.encode(state.frozen.get("codec", {}), batch)
                key_i = jax.random.fold_in(key, i)
                found = jax.device_get(self._validation_loss(average, state.frozen, batch, key_i))
                total, count = sums.get(size, (0.0, 0.0))
                sums[size] = total + float(found[0]), count + float(found[1])
        finally:
            held_out.close()
        # Weighted by images, whatever the size of the batches they came in.
        loss = sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values())
        by_size = {size: total / count for size, (total, count) in sorted(sums.items())}
        log.write(step, "validation", {"loss": loss, "loss_by_bucket": by_size})
        log.say(f"step {step}: validation loss {loss:.4f}")

    def _draw_sheet(self, state: State, step: int, log: Log) -> None:
        average = parallel.on_device(state.ema, self._mesh)
        params, adapter = parallel.on(self._mesh, networks)(self.config.lora, average, state.frozen)
        codec_params = self._features.codec_params(state.frozen.get("codec", {}))
        trees = params, adapter, codec_params
        sheet = draw_sheet(self.config, *trees, self._prompts, self._sheet_sizes, self._mesh)
        if jax.process_index() == 0:
            log.say(f"step {step}: samples in {save_sheet(sheet, Path(self.config.out) / 'samples', step)}")

    @functools.cached_property
    def _prompts(self):
        return self._features.prompts(self.config.samples.prompts)

    @property
    def _sheet_sizes(self):
        return tuple(map(parse_bucket, self.config.samples.sizes)) or self._data.buckets


class DataBatches:
    """The batches of the data, and their position as plain JSON."""

    def __init__(self, inner: Batches):
        self._inner = inner
        self.close = inner.close

    def __next__(self) -> dict:
        return next(self._inner)

    @property
    def position(self) -> dict[str, Any]:
        return self._inner.position.to_json()
