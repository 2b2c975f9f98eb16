"""Reinforcement learning as a job of the loop in `run`: draw, judge, update, over and over.

A step is one optimiser step. The first of an epoch draws its images with the old policy, which is part of the state,
and asks for their rewards; a run that is killed anywhere draws the same images again and finds their rewards in its
journal.
"""

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from rich.console import Console

from lens_jax import config as config_files
from lens_jax import parallel
from lens_jax.data.buckets import parse_bucket, parse_buckets
from lens_jax.diffusion import draw as draws
from lens_jax.diffusion import sampler
from lens_jax.encoders.text import TextFeatures
from lens_jax.errors import LensError
from lens_jax.models.latent_grid import latent_grid
from lens_jax.models.lora import scaled
from lens_jax.posttraining import epoch as epochs
from lens_jax.posttraining import painter as painters
from lens_jax.posttraining import rl_recipe as recipe
from lens_jax.posttraining.advantages import group_advantages
from lens_jax.posttraining.epoch import Images
from lens_jax.posttraining.judging import FOLDER, Judged, Sitting, mark_of
from lens_jax.posttraining.painter import Painter, Settings
from lens_jax.posttraining.prompts.prompt import Prompt, read_prompts
from lens_jax.posttraining.prompts.subset import subset
from lens_jax.posttraining.rewards.combine import TOTAL, Judging
from lens_jax.posttraining.rl_batches import Drawn, Schedule, Turn, micro_batches
from lens_jax.posttraining.rl_config import RlConfig
from lens_jax.posttraining.rl_meter import RlMeter, describe, evaluated
from lens_jax.posttraining.rollout import make_sizes
from lens_jax.pretraining import warm_start
from lens_jax.pretraining.recipe import check_widths
from lens_jax.pretraining.sheet import draw_sheet, save_sheet
from lens_jax.pretraining.start import start
from lens_jax.run import loop
from lens_jax.run.job import Event
from lens_jax.run.log import Log
from lens_jax.run.state import State, Tree, from_parts, to_parts

# Numbers of what is drawn that is no epoch; steps are below 2^31.
_EVALUATION = 1 << 31
# Prompts on a sheet where the config names none.
_SHEET_PROMPTS = 6


def train(config: RlConfig, console: Console | None = None) -> loop.Outcome:
    """Train until `config.steps`, from where the run folder `config.out` stands."""
    prompts = prompts_of(config)
    held_out = read_prompts(config.evaluation.prompts) if config.evaluation.prompts else []
    held_out = held_out[: config.evaluation.limit or None]
    if not config.rewards.train:
        raise LensError("rewards.train is empty; a run needs at least one reward to learn from")
    # Every process loads them, so that what is wrong is said by all; the first one alone asks them.
    judging = Judging.load(config.rewards)
    asked = judging if jax.process_index() == 0 else None
    try:
        return start(config, lambda *settled: Rl(*settled, prompts, held_out, asked), console)
    finally:
        judging.close()


def prompts_of(config: RlConfig) -> list[Prompt]:
    """What is learnt from: the set, or the part of it that the config names. LensError where there is none."""
    if not config.prompts:
        raise LensError("prompts names no file; give a JSON lines file of prompts, such as lens-jax prompts makes")
    return subset(read_prompts(config.prompts), config.prompts_fraction, config.prompts_without)


class Rl:
    """A `run.job.Job`: params {"lora"}, frozen {"denoiser"}, extra {"old"}; see `posttraining.policy`."""

    kind = "rl"

    def __init__(
        self,
        config: RlConfig,
        mesh: Mesh | None,
        log: Log,
        prompts: Sequence[Prompt],
        held_out: Sequence[Prompt],
        judging: Judging | None,
    ):
        """
        Args:
          prompts, held_out: those that are trained on, and those that are evaluated on; none evaluates nothing.
          judging: in the first process, its rewards.
        """
        self.config, self._mesh, self._log = config, mesh, log
        self._prompts, self._held_out = tuple(prompts), tuple(held_out)
        rewards = config_files.to_dict(config.rewards)
        self._judging, self._mark = judging, mark_of([rewards["train"], rewards["evaluation"]])
        self.rules = recipe.rules(config)
        self.meter = RlMeter()
        self._turns = recipe.turns(config)
        self._programs = jax.tree.map(functools.partial(parallel.on, mesh), recipe.make_programs(config))
        self._follow = parallel.on(mesh, recipe.make_follow(config))
        self._drawn: Drawn | None = None
        self._totals = None
        self.events = (
            Event(config.evaluation.every if held_out else 0, self._evaluate),
            Event(config.samples.every, self._draw_sheet),
        )

    def check(self) -> None:
        """Loads the frozen networks and asks the rewards, which is where theirs is checked."""
        config, rollout = self.config, self.config.rollout
        if not config.init_from:
            raise LensError(f"init_from names nothing to train; accepted: {warm_start.ACCEPTED}")
        check_widths(config)
        epochs.prompts_of_epoch(config.seed, 0, rollout.groups, len(self._prompts))
        parallel.check_batch_size(rollout.batch_size, self._mesh)
        for size in self._sheet_sizes:
            latent_grid(config.codec, size.height, size.width)
        encoder = self._text_encoder
        texts = [prompt.prompt for prompt in (*self._prompts, *self._held_out)]
        room = painters.longest(encoder, texts, config.text.max_tokens)
        self._sizes = make_sizes(config.codec, parse_buckets(rollout.sizes), room, rollout.joint_multiple)
        if not config.codec.abstract_fitted():
            self._codec_weights  # noqa: B018  better now than when the first image is decoded
        if self._judging is not None:
            self._judging.check()

    # The state.

    def abstract(self) -> State:
        return recipe.abstract_state(self.config, self._mesh)

    def create(self) -> State:
        params, fitted = self._load_base()
        if fitted is None and self.config.codec.abstract_fitted():
            raise LensError(f"init_from {self.config.init_from}: has no statistics of a codec; give a run that has")
        self._log.say(f"starting from {self.config.init_from}")
        create = functools.partial(recipe.create_state, self.config)
        fitted = {} if fitted is None else fitted
        state = parallel.create(create, self.rules, self._mesh, fitted, params)
        if name := recipe.base(self.config):
            state = state.replace(extra={**state.extra, **warm_start.mark(state.frozen[name], self._mesh)})
        return state

    def _load_base(self) -> tuple[Tree, Tree | None]:
        params, fitted = warm_start.load(self.config, self._mesh, self._log.say)
        return unflatten_dict(params, sep="/"), fitted

    def parts(self, state: State) -> dict[str, Any]:
        """All but the base, which stays where the run began."""
        kept = {name: tree for name, tree in state.frozen.items() if name == "codec"}
        return to_parts(state.replace(frozen=kept))

    def resume(self, parts: dict[str, Any]) -> State:
        state, name = from_parts(parts, self.abstract()), recipe.base(self.config)
        if name is None:
            return state
        tree, _ = self._load_base()
        if not self.config.lora.rank:  # else it was read in the right dtype
            tree = parallel.on(self._mesh, warm_start.cast_program)(tree, self.config.model.dtype)
        warm_start.check_mark(state.extra, tree, self._mesh, f"init_from {self.config.init_from}", self.config.out)
        return state.replace(frozen={**parts.get("frozen", {}), name: tree})

    def meta(self) -> dict[str, Any]:
        """The config, and the sizes that are drawn, of which sampling takes the squarest by default."""
        sizes = [[size.height, size.width] for size in self._sizes.buckets]
        return {"config": config_files.to_dict(self.config), "sizes": sizes}

    # Steps.

    def batches(self, position: dict[str, Any] | None) -> "Schedule":
        mark = zlib.crc32("\n".join(f"{prompt.id}\n{prompt.prompt}" for prompt in self._prompts).encode())
        if position is not None and position.get("prompts") != mark:
            raise LensError(
                f"prompts {self.config.prompts}: not the set that the run in {self.config.out} began with; give that, "
                "or choose another folder for a new run"
            )
        return Schedule(0 if position is None else int(position["update"]), self._turns.updates, mark)

    def step(self, state: State, batches: Iterator[Turn]) -> tuple[State, dict[str, Any]]:
        turn = next(batches)
        if turn.number == 0:
            self._before(state)
        said = None
        if self._drawn is None or self._drawn.epoch != turn.epoch:
            self._drawn = None
            self._drawn, said = self._draw(state, turn.epoch)
        self.meter.dispatch(said)
        batches_ = micro_batches(self.config, self._sizes, self._drawn, turn.update, self._mesh)
        for micro, batch in enumerate(batches_):
            if self._totals is None:
                self._totals = self._programs.empty_totals(state, batch)
            self._totals = self._programs.micro_step(state, self._totals, batch, micro)
        state, self._totals, metrics = self._programs.update(state, self._totals)
        if turn.update == self._turns.updates - 1:
            state, self._drawn = self._follow(state), None
        return state, metrics

    # Images.

    def _draw(self, state: State, epoch: int) -> tuple[Drawn, dict[str, Any] | None]:
        """Draw an epoch, wait for its rewards, and what is said of it by the first process.

        All processes end with the same rewards, or with an error.
        """
        config, rollout, started = self.config, self.config.rollout, time.perf_counter()
        numbers = epochs.prompts_of_epoch(config.seed, epoch, rollout.groups, len(self._prompts))
        images = epochs.images_of_epoch(config.seed, epoch, numbers, rollout.images, len(self._sizes.buckets))
        prompts = [self._prompts[number] for number in numbers]
        settings = lambda tokens: Settings(*recipe.rollout_inputs(config, tokens))
        features, chunks, judging = self._paint(
            state, state.extra["old"], images, prompts, epoch, settings, f"epoch_{epoch:06d}", keep=True
        )
        drawing = time.perf_counter() - started
        judged = judging()
        shape = rollout.groups, rollout.images
        missing = np.full(shape, np.nan)
        rewards = missing if judged is None else judged.values.get(TOTAL, missing)
        # float32, since that is what crosses processes.
        rewards = parallel.of_first_process(rewards.astype(np.float32))
        advantages = group_advantages(rewards)
        if advantages.missing > config.rewards.max_failed:
            why = "" if not (judged and judged.errors) else f"; most often: {max(judged.errors, key=judged.errors.get)}"
            raise LensError(
                f"epoch {epoch}: {advantages.missing:.1%} of the images have no reward, more than "
                f"rewards.max_failed {config.rewards.max_failed:.1%}{why}"
            )
        values = None
        if judged is not None:
            clip = config.nft.z_c if config.algorithm == "nft" else config.grpo.advantage_clip
            sizes, names = images.size.reshape(shape), [str(bucket) for bucket in self._sizes.buckets]
            categories = [prompt.category for prompt in prompts]
            said = describe(judged, rewards, advantages, clip, categories, sizes, names)
            seconds = {"drawing_seconds": drawing, "judge_wait_seconds": time.perf_counter() - started - drawing}
            values = {**said, **seconds, "judge": self._judging.counts()}
        return Drawn(epoch, images, chunks, features, advantages), values

    def _paint(
        self,
        state: State,
        tree: Tree,
        images: Images,
        prompts: Sequence[Prompt],
        number: int,
        settings: Callable[[int], Settings],
        name: str,
        keep: bool,
    ) -> tuple[TextFeatures, list, Callable[[], Judged | None]]:
        """(features of the prompts, what `Painter.draw` keeps, a function that waits for the rewards)."""
        config, members = self.config, len(images.group) // len(prompts)
        sitting = None
        if self._judging is not None:
            path, shape = Path(config.out) / FOLDER / f"{name}.jsonl", (len(prompts), members)
            # Only an evaluation asks the rewards that are never learnt from.
            held_out = number == _EVALUATION
            sitting = Sitting(self._judging, path, shape, config.rollout.waiting, self._mark, held_out)

        def on_group(group: int, pictures: list[np.ndarray | None]) -> None:
            if sitting is not None:
                sitting.add(group, prompts[group], pictures)

        def progress(count: int) -> None:
            self._log.note(f"{name}: {count} of {len(images.group)} images drawn")

        features = painters.encode(self._text_encoder, [prompt.prompt for prompt in prompts], self._sizes.text)
        codec_params = state.frozen.get("codec") or self._codec_weights.params
        sizes, batch_size = self._sizes, config.rollout.batch_size
        painter = Painter(recipe.policy(config), config.codec, codec_params, sizes, batch_size, self._mesh)
        keys = painters.keys_of(draws.seed_key(config.seed), number, images)
        fixed = {**state.frozen, **state.extra}
        try:
            chunks = painter.draw(fixed, tree, images, features, keys, settings, on_group, keep, progress)
        except Exception:  # whatever it is, it goes on from here
            if sitting is not None:
                sitting.settle()  # what has been asked for is worth writing down
            raise
        return features, chunks, lambda: _agreed(sitting)

    def _before(self, state: State) -> None:
        """What events do after steps, before the first one: what a run is compared with."""
        for event in self.events:
            if event.every:
                event.act(state, 0, self._log)

    def _evaluate(self, state: State, step: int, log: Log) -> None:
        """Rewards of the moving average on held-out prompts, always from the same noise."""
        config, prompts = self.config, self._held_out
        evaluation, sizes = config.evaluation, self._sizes.buckets
        numbers = np.arange(len(prompts))
        images = epochs.images_of_epoch(config.seed, _EVALUATION, numbers, evaluation.images, len(sizes))
        scale = None if evaluation.guidance_scale == 1 else np.float32(evaluation.guidance_scale)
        sigmas = lambda tokens: sampler.sigma_schedule(tokens, evaluation.num_inference_steps)
        settings = lambda tokens: Settings(config.rollout.solver, sigmas(tokens), None, scale)
        tree = state.ema[recipe.policy(config).trained]
        name = f"evaluation_{step:06d}"
        *_, judging = self._paint(state, tree, images, prompts, _EVALUATION, settings, name, keep=False)
        if (judged := judging()) is not None:
            values = evaluated(judged, [prompt.category for prompt in prompts])
            log.write(step, "evaluation", values)
            named = {name: value for name, value in values["by_name"].items() if "/" not in name}
            shown = "  ".join(f"{name} {value:.4f}" for name, value in named.items())
            log.say(f"step {step}: on {len(prompts)} held-out prompts {shown}")

    def _draw_sheet(self, state: State, step: int, log: Log) -> None:
        """Fixed prompts from fixed noise, by the moving average."""
        config, policy = self.config, recipe.policy(self.config)
        average = state.ema[policy.trained]
        params, adapter = (state.frozen["denoiser"], scaled(average, config.lora.scale)) if config.lora.rank else (
            average, None
        )  # fmt: skip
        chosen = config.samples.prompts or tuple(
            prompt.prompt for prompt in (self._held_out or self._prompts)[:_SHEET_PROMPTS]
        )
        named = dataclasses.replace(config, samples=dataclasses.replace(config.samples, prompts=chosen))
        features = painters.encode(self._text_encoder, chosen, self._sizes.text)
        codec_params = state.frozen.get("codec") or self._codec_weights.params
        sheet = draw_sheet(named, params, adapter, codec_params, features, self._sheet_sizes, self._mesh)
        if jax.process_index() == 0:
            log.say(f"step {step}: samples in {save_sheet(sheet, Path(config.out) / 'samples', step)}")

    @functools.cached_property
    def _text_encoder(self):
        return self.config.text.load(self._mesh)

    @functools.cached_property
    def _codec_weights(self):
        return self.config.codec.load(self._mesh)

    @property
    def _sheet_sizes(self):
        """By default the squarest of the sizes that are drawn."""
        sizes = parse_buckets(self.config.rollout.sizes)
        squarest = min(sizes, key=lambda size: max(size.height, size.width) / min(size.height, size.width))
        return tuple(map(parse_bucket, self.config.samples.sizes)) or (squarest,)


def _agreed(sitting: Sitting | None) -> Judged | None:
    """What the first process was answered; every process stops where it could get no answers."""
    judged, failure = None, None
    try:
        judged = sitting and sitting.end()
    except LensError as error:
        failure = error
    if int(parallel.of_first_process(np.int32(failure is not None))):
        raise failure or LensError("the first process could get no rewards; it says why")
    return judged
