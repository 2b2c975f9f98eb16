"""Few-step distillation as a job of the loop in `run`: how Lens becomes Lens-Turbo."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from lens_jax import config as config_files
from lens_jax import parallel
from lens_jax.contact_sheet import contact_sheet
from lens_jax.data.buckets import Bucket, parse_bucket, parse_buckets
from lens_jax.data.datasets import DataSets, open_data, repetition
from lens_jax.data.mixture import START, Position, Shape
from lens_jax.data.pipeline import batches as data_batches
from lens_jax.diffusion import sampler
from lens_jax.errors import LensError
from lens_jax.models.latent_grid import latent_grid
from lens_jax.models.lora import scaled
from lens_jax.posttraining import distill_recipe as recipe
from lens_jax.posttraining import painter, teacher
from lens_jax.posttraining.distill_captions import CaptionBatches, read_captions
from lens_jax.posttraining.distill_config import DistillConfig
from lens_jax.posttraining.distill_discriminator import neighbours
from lens_jax.posttraining.distill_meter import DistillMeter, Reference
from lens_jax.posttraining.distill_networks import Networks
from lens_jax.posttraining.distill_reference import reference_program
from lens_jax.pretraining import warm_start
from lens_jax.pretraining.features import Features
from lens_jax.pretraining.job import DataBatches
from lens_jax.pretraining.precompute import check_features
from lens_jax.pretraining.recipe import check_widths
from lens_jax.pretraining.sheet import draw_column, save_sheet
from lens_jax.pretraining.start import start
from lens_jax.pretraining.tokens import Tokens, token_counts
from lens_jax.run import loop
from lens_jax.run.job import Batches, Event
from lens_jax.run.log import Log
from lens_jax.run.state import State, Tree, from_parts, to_parts
from lens_jax.run.step import Batch


def train(config: DistillConfig, console: Console | None = None) -> loop.Outcome:
    """Train until `config.steps`, from where the run folder `config.out` stands."""
    return start(config, Distillation, console)


class Distillation:
    """A `run.job.Job`: params of the student, {"fake"} and {"head"}, frozen {"teacher"}; see `distill_networks`."""

    kind = "distillation"

    def __init__(self, config: DistillConfig, mesh: Mesh | None, log: Log):
        self.config, self._mesh, self._log = config, mesh, log
        self.rules = recipe.rules(config)
        self.meter = DistillMeter(config, log.say)
        self._networks = Networks.of(config)
        self._rows = functools.partial(parallel.rows_of_host, mesh)
        self._data: DataSets | None = None if config.captions else open_data(config.data)
        self._programs = jax.tree.map(functools.partial(parallel.on, mesh), recipe.make_programs(config))
        self._taken: int | None = None
        self._totals: dict[str, Any] = {}
        self._by_shape: dict[Tokens, Batch] = {}
        self._teacher_columns: list[np.ndarray] | None = None
        self._draws = config.samples.every > 0 and bool(config.samples.prompts)
        self.events = (Event(config.samples.every if self._draws else 0, self._draw_sheet),)

    def check(self) -> None:
        """Loads the frozen networks as well, which is where theirs are checked."""
        config, data = self.config, self._data
        teacher.check(config)
        check_widths(config)
        if data is None:
            self._captions = read_captions(config.captions)
            parallel.check_batch_size(config.data.batch_size, self._mesh)
            shapes = tuple(map(Shape, parse_buckets(config.sizes)))
        else:
            if line := repetition(data):
                self._log.say(line)
            for size in data.sizes(data.feeds("train")[0]).values():
                parallel.check_batch_size(size, self._mesh)
            if data.features:
                check_features(config, data.indexes[0])
            shapes = data.shapes
        self._buckets = tuple(dict.fromkeys(shape.bucket for shape in shapes))
        for size in self._sheet_sizes if self._draws else ():
            latent_grid(config.codec, size.height, size.width)
        self._features = Features(config, shapes, self._mesh, cached=data is not None and data.features is not None)
        if data is None:
            # Room for the longest caption, which the encoder knows.
            encoder, most = self._features.text_encoder, config.text.max_tokens
            self._text_class = painter.longest(encoder, self._captions, most)
            shapes = tuple(Shape(bucket, self._text_class) for bucket in self._buckets)
            self._features.counts = token_counts(config, shapes)
        if self._draws:
            # What loads the encoders or refuses a prompt must not wait for the first sheet.
            self._prompts  # noqa: B018
            if not config.codec.abstract_fitted():
                self._features.codec_params({})

    # The state.

    def abstract(self) -> State:
        return recipe.abstract_state(self.config, self._mesh)

    def create(self) -> State:
        config = self.config
        params, fitted = teacher.load(config, config.teacher_lora, self._mesh, self._log.say)
        if fitted is None and config.codec.abstract_fitted():
            raise LensError(f"init_from {config.init_from}: has no statistics of a codec; give a run that has")
        beside = f" with the adapter {config.teacher_lora}" if config.teacher_lora else ""
        self._log.say(f"the teacher is {config.init_from}{beside}")
        create = functools.partial(recipe.create_state, config)
        state = parallel.create(
            create, self.rules, self._mesh, {} if fitted is None else fitted, params, offload=config.offload
        )
        return state.replace(extra={**state.extra, **warm_start.mark(state.frozen["teacher"], self._mesh)})

    def parts(self, state: State) -> dict[str, Any]:
        """All but the teacher, which stays where the run began."""
        kept = {name: tree for name, tree in state.frozen.items() if name == "codec"}
        return to_parts(state.replace(frozen=kept))

    def resume(self, parts: dict[str, Any]) -> State:
        config, state = self.config, from_parts(parts, self.abstract())
        tree, _ = teacher.load(config, config.teacher_lora, self._mesh, self._log.say)
        if not config.lora.rank:  # else it was read in the right dtype
            tree = parallel.on(self._mesh, warm_start.cast_program)(tree, config.model.dtype)
        named = f"init_from {config.init_from}, teacher_lora {config.teacher_lora or 'none'}"
        warm_start.check_mark(state.extra, tree, self._mesh, named, config.out)
        self.meter.reference = Reference(**{name: float(value) for name, value in state.extra["reference"].items()})
        return state.replace(frozen={**parts.get("frozen", {}), "teacher": tree})

    def meta(self) -> dict[str, Any]:
        """The config, the sizes it was trained on, and how the student is meant to be sampled."""
        sizes = [[size.height, size.width] for size in self._buckets]
        steps = self.config.generator.num_inference_steps
        sampling = {"num_inference_steps": steps, "guidance_scale": 1.0}
        return {"config": config_files.to_dict(self.config), "sizes": sizes, "sampling": sampling}

    # Steps.

    def batches(self, position: dict[str, Any] | None) -> Batches:
        config = self.config
        if self._data is None:
            return CaptionBatches(
                self._captions,
                self._buckets,
                self._text_class,
                config.data.batch_size,
                config.seed,
                self._rows,
                self._features.read,
                position,
            )
        at = START if position is None else Position.from_json(position, f"the checkpoints of {config.out}")
        return DataBatches(data_batches(self._data, at, transform=self._features.read, rows=self._rows))

    def step(self, state: State, batches: Iterator[dict]) -> tuple[State, dict[str, Any]]:
        """A global step: fake score and discriminator some times, then the student; or one of the warm start."""
        config, programs = self.config, self._programs
        if self._taken is None:
            self._taken = int(state.step)
        self._taken += 1
        self._images, new = 0, self.meter.reference is None
        if self._taken <= config.warm_start.steps:
            state, metrics = self._update("warm_start", state, batches, config.fake.updates + 1)
        else:
            self._totals.pop("warm_start", None)
            found = []
            for number in range(config.fake.updates):
                state, one = self._update("fake", state, batches, number)
                found.append(one)
            state, metrics = self._update("student", state, batches, config.fake.updates)
            metrics = programs.joined(found, metrics)
        if new:
            values = {name: np.float32(value) for name, value in dataclasses.asdict(self.meter.reference).items()}
            reference = {name: parallel.everywhere(value, self._mesh) for name, value in values.items()}
            state = state.replace(extra={**state.extra, "reference": reference})
        self.meter.dispatch(self._images)
        return state, metrics

    def _update(self, kind: str, state: State, batches: Iterator[dict], number: int) -> tuple[State, dict[str, Any]]:
        programs, accumulation = getattr(self._programs, kind), self.config.accumulation
        if accumulation == 1:
            return programs.train_step(state, self._next(state, batches), number)
        for micro in range(accumulation):
            batch = self._next(state, batches)
            if kind not in self._totals:
                self._totals[kind] = programs.empty_totals(state, batch)
            self._totals[kind] = programs.micro_step(state, self._totals[kind], batch, number, micro)
        state, self._totals[kind], metrics = programs.update(state, self._totals[kind])
        return state, metrics

    def _next(self, state: State, batches: Iterator[dict]) -> Batch:
        batch = dict(next(batches))
        tokens = self._features.counts[Shape.of(batch)]
        self._images += parallel.global_rows(self._mesh, len(batch["text_lengths"]))
        if not self.config.gan:
            # No image is encoded.
            batch = {name: value for name, value in batch.items() if name not in ("pixels", "latents")}
        batch = {**self._features.encode(state.frozen.get("codec", {}), batch), **self._of_shape(tokens)}
        if self.meter.reference is None:
            self._look_at_teacher(state, batch, tokens)
        return batch

    def _of_shape(self, tokens: Tokens) -> Batch:
        """What batches of a shape have besides: the student's noise levels and, for the heads, neighbours."""
        if tokens in self._by_shape:
            return self._by_shape[tokens]
        found = {"sigmas": sampler.sigma_schedule(tokens.image, self.config.generator.num_inference_steps)}
        if self.config.gan:
            found["neighbours"] = neighbours(tokens.grid, tokens.padded)
        self._by_shape[tokens] = {name: parallel.everywhere(value, self._mesh) for name, value in found.items()}
        return self._by_shape[tokens]

    def _look_at_teacher(self, state: State, batch: Batch, tokens: Tokens) -> None:
        """What the student's samples are compared with, in all of a run: what the teacher draws for its first batch."""
        samples = self.config.samples
        sigmas = parallel.everywhere(sampler.sigma_schedule(tokens.image, samples.num_inference_steps), self._mesh)
        program = parallel.on(self._mesh, reference_program)
        found = program(self._networks, samples.guidance_scale, state.frozen["teacher"], batch, sigmas, samples.seed)
        self.meter.reference = Reference(*map(float, jax.device_get(found)))

    # Sheets.

    def _draw_sheet(self, state: State, step: int, log: Log) -> None:
        """Fixed prompts from fixed noise: for every size the student's average, the student, and the teacher."""
        config, name = self.config, self._networks.student
        few = dataclasses.replace(
            config.samples, num_inference_steps=config.generator.num_inference_steps, guidance_scale=1.0
        )
        average = parallel.on_device(state.ema, self._mesh)[name]
        columns = zip(self._columns(state, average, few), self._columns(state, state.params[name], few))
        if self._teacher_columns is None:
            self._teacher_columns = self._columns(state, None, config.samples)
        if jax.process_index() == 0:
            rows = list(zip(*(column for pair, own in zip(columns, self._teacher_columns) for column in (*pair, own))))
            sheet = contact_sheet(rows, config.samples.prompts)
            where = save_sheet(sheet, Path(config.out) / "samples", step)
            log.say(f"step {step}: average, student and teacher side by side in {where}")

    def _columns(self, state: State, tree: Tree | None, samples) -> list[np.ndarray]:
        """For every size, images uint8 [prompts, H, W, 3] of a tree of the student's, or of the teacher."""
        config, base = self.config, state.frozen["teacher"]
        if config.lora.rank:
            params, adapter = base, None if tree is None else scaled(tree, config.lora.scale)
        else:
            params, adapter = base if tree is None else tree, None
        named = dataclasses.replace(config, samples=samples)
        codec_params = self._features.codec_params(state.frozen.get("codec", {}))
        draw = lambda size: draw_column(named, params, adapter, codec_params, self._prompts, size, self._mesh)
        return [draw(size) for size in self._sheet_sizes]

    @functools.cached_property
    def _prompts(self):
        return self._features.prompts(self.config.samples.prompts)

    @property
    def _sheet_sizes(self) -> tuple[Bucket, ...]:
        """By default the squarest of the sizes that are trained on."""
        squarest = min(self._buckets, key=lambda size: max(size.height, size.width) / min(size.height, size.width))
        return tuple(map(parse_bucket, self.config.samples.sizes)) or (squarest,)
