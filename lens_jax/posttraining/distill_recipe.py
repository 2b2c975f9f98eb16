"""What a distillation config makes: the state, and the programs of a global step.

A global step is one step of the loop: `fake.updates` updates of fake score and discriminator, then one of the student,
after which the fake score moves a little towards it. They are two programs, each compiled once for every shape of
batches, and every update has a batch of its own, so buckets mix within a step. A checkpoint is between global steps;
so the phase within one needs no saving, and what a killed run had taken of it is taken again.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lens_jax import parallel
from lens_jax.models import denoiser, lora
from lens_jax.posttraining import distill_discriminator
from lens_jax.posttraining.distill_config import DistillConfig
from lens_jax.posttraining.distill_losses import mixed
from lens_jax.posttraining.distill_networks import Networks
from lens_jax.posttraining.distill_updates import fake_update_loss, student_update_loss
from lens_jax.posttraining.distill_warm_start import regression_loss
from lens_jax.pretraining import features
from lens_jax.pretraining.features import Tokens
from lens_jax.pretraining.warm_start import cast
from lens_jax.run import step
from lens_jax.run.optimizer import each, learning_rate_schedule, make_optimizer
from lens_jax.run.state import State, Tree
from lens_jax.run.step import Batch, Loss, StepConfig, Totals


class Moments(NamedTuple):
    """The optimisers of a state."""

    student: optax.OptState
    # Of fake score and heads.
    fake: optax.OptState


def rules(config: DistillConfig) -> parallel.Rules:
    """The sharding rules of every tree of a state."""
    trained = parallel.LORA_RULES if config.lora.rank else parallel.DENOISER_RULES
    return {
        Networks.of(config).student: trained,
        "fake": trained,
        # 0.44 million parameters: whole on every device.
        "head": {r".*": ()},
        "teacher": parallel.DENOISER_RULES,
        "codec": parallel.AUTOENCODER_RULES,
        "base": {"checksum": ()},
        "reference": {".*": ()},
    }


def create_state(config: DistillConfig, fitted: Tree, params: Tree) -> State:
    """The state at step 0. Pure, so `jax.eval_shape` of it describes a checkpoint.

    fitted: what the codec was fitted to; {} for one with released weights. params: the teacher, in float32 where
    student and fake score begin as copies of it.
    """
    key = jax.random.key(config.seed)
    copy = functools.partial(jax.tree.map, jnp.copy)  # a donated state must not have an array twice
    tree = params
    if config.lora.rank:
        # The same for both: mixing two adapters factor by factor is mixing what they add as long as they are alike.
        tree = lora.init(config.lora, denoiser.abstract_params(config.model), jax.random.fold_in(key, 0))
    student = {Networks.of(config).student: tree}
    trained = {"fake": copy(tree)}
    if config.gan:
        trained["head"] = distill_discriminator.init(config, jax.random.fold_in(key, 2))
    frozen = {"teacher": cast(params if config.lora.rank else copy(params), config.model.dtype)}
    if fitted:
        frozen["codec"] = jax.tree.map(jnp.asarray, fitted)
    return State(
        step=jnp.zeros((), jnp.int32),
        params={**student, **trained},
        frozen=frozen,
        ema=copy(student),
        opt_state=Moments(_student_optimizer(config).init(student), _fake_optimizer(config).init(trained)),
        extra={
            "base": {"checksum": jnp.zeros((), jnp.uint32)},
            # Measured on the first batch of a run (`distill_reference`), and never again.
            "reference": {"mean": jnp.zeros(()), "std": jnp.zeros(())},
        },
        key=jax.random.fold_in(key, 1),
    )


def abstract_state(config: DistillConfig, mesh) -> State:
    """Shapes, dtypes and layouts of all that a run keeps on its devices, or offloads; `mesh` may be abstract."""
    create = functools.partial(create_state, config)
    fitted, params = config.codec.abstract_fitted(), denoiser.abstract_params(config.model)
    return parallel.abstract(create, rules(config), mesh, fitted, params, offload=config.offload)


def abstract_batch(config: DistillConfig, images: int, tokens: Tokens, mesh) -> Batch:
    """Shapes, dtypes and, on a mesh, layouts of what an update reads of so many images of one shape."""
    batch = features.abstract_batch(config, images, tokens, mesh)
    whole = functools.partial(parallel.abstract_array, "positions", mesh=mesh)
    batch["sigmas"] = whole((config.generator.num_inference_steps + 1,), jnp.float32)
    if config.gan:
        batch["neighbours"] = whole((tokens.padded, distill_discriminator.WINDOW), jnp.int32)
    else:
        del batch["latents"]
    return batch


def _student_optimizer(config: DistillConfig):
    return make_optimizer(config.optimizer, config.steps)


def _fake_optimizer(config: DistillConfig):
    made = {"fake": make_optimizer(config.fake_optimizer, config.steps)}
    if config.gan:
        made["head"] = make_optimizer(config.head_optimizer, config.steps)
    return each(made)


@dataclasses.dataclass(frozen=True)
class Update:
    """One kind of update: `run.step` on the part of a state that it changes."""

    static: StepConfig
    loss: Loss
    optimizer: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    # state -> a state of what is trained, with all that its loss reads among what is frozen.
    part: Callable[[State], State]
    # (state, that part of it after the update) -> the state after it.
    whole: Callable[[State, State], State]

    def _numbered(self, state: State, number: jax.Array) -> State:
        # No two updates of a global step draw the same.
        return self.part(state).replace(key=jax.random.fold_in(state.key, number))

    def _placed(self, state: State) -> State:
        return parallel.move_offloaded(state, jax.memory.Space.Host) if self.static.offload else state

    def train_step(self, state: State, batch: Batch, number: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        part, metrics = step.train_step(
            self.static, self.loss, self.optimizer, self.schedule, self._numbered(state, number), batch
        )
        return self._placed(self.whole(state, part)), metrics

    def empty_totals(self, state: State, batch: Batch) -> Totals:
        return step.empty_totals(self.static, self.loss, self.part(state), batch)

    def micro_step(self, state: State, totals: Totals, batch: Batch, number: jax.Array, micro: jax.Array) -> Totals:
        return step.micro_step(self.static, self.loss, self._numbered(state, number), totals, batch, micro)

    def update(self, state: State, totals: Totals) -> tuple[State, Totals, dict[str, jax.Array]]:
        part, totals, metrics = step.update(self.static, self.optimizer, self.schedule, self.part(state), totals)
        return self._placed(self.whole(state, part)), totals, metrics


class Programs(NamedTuple):
    """On a mesh they are called, traced and lowered with it.

    After the batch, those of an update take its number within the global step.
    """

    fake: step.Programs
    student: step.Programs
    # None where the config has no warm start.
    warm_start: step.Programs | None
    # (metrics of the updates of the fake score, metrics of the student's) -> metrics of the global step.
    joined: Any


def make_programs(config: DistillConfig) -> Programs:
    """The programs of a run; nothing is traced yet."""
    made = lambda one: step.jitted(one.train_step, one.empty_totals, one.micro_step, one.update)
    warm = made(warm_start_update(config)) if config.warm_start.steps else None
    return Programs(made(fake_update(config)), made(student_update(config)), warm, jax.jit(joined))


def _static(config: DistillConfig, ema_decay: float | None) -> StepConfig:
    skip = config.nonfinite == "skip"
    return StepConfig(ema_decay, skip_nonfinite=skip, accumulation=config.accumulation, offload=config.offload)


def fake_update(config: DistillConfig) -> Update:
    """Of fake score and heads."""
    name = Networks.of(config).student

    def part(state: State) -> State:
        params, student = {k: v for k, v in state.params.items() if k != name}, {name: state.params[name]}
        return state.replace(
            params=params, frozen={**state.frozen, **student}, ema=None, opt_state=state.opt_state.fake
        )

    def whole(state: State, changed: State) -> State:
        # The step counts updates of the student.
        moments = state.opt_state._replace(fake=changed.opt_state)
        return state.replace(params={**state.params, **changed.params}, opt_state=moments)

    schedule = learning_rate_schedule(config.fake_optimizer, config.steps)
    loss = functools.partial(fake_update_loss, config)
    return Update(_static(config, None), loss, _fake_optimizer(config), schedule, part, whole)


def student_update(config: DistillConfig) -> Update:
    """Of the student and its average; then the fake score moves towards it."""
    optimizer, schedule = _student_optimizer(config), learning_rate_schedule(config.optimizer, config.steps)
    loss = functools.partial(student_update_loss, config)
    return _of_student(config, loss, optimizer, schedule, config.fake.mix)


def warm_start_update(config: DistillConfig) -> Update:
    """Of the student and its average alone."""
    rate = dataclasses.replace(
        config.optimizer, learning_rate=config.warm_start.learning_rate, warmup_steps=0, schedule="constant"
    )
    loss = functools.partial(regression_loss, Networks.of(config), config.generator, config.warm_start)
    optimizer, schedule = make_optimizer(rate, config.steps), learning_rate_schedule(rate, config.steps)
    return _of_student(config, loss, optimizer, schedule, 0.0)


def _of_student(config: DistillConfig, loss, optimizer, schedule, mix: float) -> Update:
    name = Networks.of(config).student

    def part(state: State) -> State:
        rest = {k: v for k, v in state.params.items() if k != name}
        return state.replace(
            params={name: state.params[name]}, frozen={**state.frozen, **rest}, opt_state=state.opt_state.student
        )

    def whole(state: State, changed: State) -> State:
        student = changed.params[name]
        params = {**state.params, name: student}
        if mix:
            params["fake"] = mixed(state.params["fake"], student, mix)
        moments = state.opt_state._replace(student=changed.opt_state)
        return state.replace(step=changed.step, params=params, ema=changed.ema, opt_state=moments)

    return Update(_static(config, config.ema_decay), loss, optimizer, schedule, part, whole)


# What every update logs; all else is sums over rows.
_COMMON = ("loss", "losses", "gradient_norm", "update_norm", "parameter_norm", "learning_rate", "finite")


def joined(fakes: Sequence[dict[str, jax.Array]], student: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The metrics of a global step: those of the student, sums of all, and means of the fake score's updates."""
    stacked = jax.tree.map(lambda *values: jnp.stack(values), *fakes)
    found = {name: jnp.sum(values, 0) for name, values in stacked.items() if name not in _COMMON}
    found |= {f"fake_{name}": jnp.mean(stacked[name]) for name in ("gradient_norm", "update_norm")}
    finite = jnp.all(stacked["finite"])
    # Where the fault is the fake score's, its norm says so: that of the student may be all right.
    norm = jnp.where(finite, student["gradient_norm"], jnp.sum(stacked["gradient_norm"]))
    return {**found, **student, "gradient_norm": norm, "finite": student["finite"] & finite}
