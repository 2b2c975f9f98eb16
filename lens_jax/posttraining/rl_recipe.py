"""What a reinforcement learning config makes: the state, the programs of a step, and how the old policy follows."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lens_jax import parallel
from lens_jax.data.buckets import parse_buckets
from lens_jax.diffusion import sampler, sde
from lens_jax.errors import LensError
from lens_jax.models import denoiser, lora
from lens_jax.posttraining import epoch, grpo, nft, rl_loss, rollout
from lens_jax.posttraining.policy import Policy
from lens_jax.posttraining.rl_config import RlConfig
from lens_jax.pretraining.warm_start import cast
from lens_jax.run import step
from lens_jax.run.optimizer import learning_rate_schedule, make_optimizer
from lens_jax.run.state import State, Tree


def rules(config: RlConfig) -> parallel.Rules:
    """The sharding rules of every tree of a state."""
    trained = parallel.LORA_RULES if config.lora.rank else parallel.DENOISER_RULES
    name = policy(config).trained
    fixed = {"denoiser": parallel.DENOISER_RULES, "reference": parallel.DENOISER_RULES}
    return {**fixed, name: trained, "old": trained, "codec": parallel.AUTOENCODER_RULES, "base": {"checksum": ()}}


def policy(config: RlConfig) -> Policy:
    return Policy(config.model, config.lora, config.mesh.reduce_dtype)


def base(config: RlConfig) -> str | None:
    """The frozen tree that is read again from `init_from` when a run goes on, and no checkpoint has; None without any.

    What an adapter is beside; or, where all parameters are trained, what the KL is a distance to.
    """
    if config.lora.rank:
        return "denoiser"
    return "reference" if kl(config) else None


def kl(config: RlConfig) -> float:
    """The weight of the distance to the reference; 0 asks it nothing."""
    return config.nft.kl if config.algorithm == "nft" else config.grpo.kl


def create_state(config: RlConfig, fitted: Tree, params: Tree) -> State:
    """The state at step 0. Pure, so `jax.eval_shape` of it describes a checkpoint.

    fitted: what the codec was fitted to; {} for one with released weights. params: the denoiser.
    """
    key = jax.random.key(config.seed)
    copy = functools.partial(jax.tree.map, jnp.copy)  # a donated state must not have an array twice
    tree = params
    if config.lora.rank:
        tree = lora.init(config.lora, denoiser.abstract_params(config.model), jax.random.fold_in(key, 0))
    trained, extra, frozen = {policy(config).trained: tree}, {"old": copy(tree)}, {}
    if name := base(config):
        frozen[name] = cast(params if config.lora.rank else copy(params), config.model.dtype)
        # Tells it from others.
        extra["base"] = {"checksum": jnp.zeros((), jnp.uint32)}
    if fitted:
        frozen["codec"] = jax.tree.map(jnp.asarray, fitted)
    return State(
        step=jnp.zeros((), jnp.int32),
        params=trained,
        frozen=frozen,
        ema=copy(trained),
        opt_state=make_optimizer(config.optimizer, config.steps).init(trained),
        extra=extra,
        key=jax.random.fold_in(key, 1),
    )


def abstract_state(config: RlConfig, mesh) -> State:
    """Shapes, dtypes and layouts of all that a run keeps on its devices; `mesh` may be abstract."""
    create = functools.partial(create_state, config)
    fitted, params = config.codec.abstract_fitted(), denoiser.abstract_params(config.model)
    return parallel.abstract(create, rules(config), mesh, fitted, params)


class Turns(NamedTuple):
    """How an epoch is trained on: `micro_steps` batches in each of `updates` updates."""

    chunks: int
    # Sampling levels that each image is trained at.
    levels: int
    updates: int

    @property
    def micro_steps(self) -> int:
        return self.chunks // self.updates * self.levels


def turns(config: RlConfig) -> Turns:
    """LensError where the batches of an epoch cannot be shared out to its updates."""
    rollout_ = config.rollout
    sizes = len(parse_buckets(rollout_.sizes))
    chunks = epoch.count_chunks(rollout_.groups * rollout_.images, sizes, rollout_.batch_size)
    if chunks % rollout_.updates:
        raise LensError(
            f"rollout.updates is {rollout_.updates}, which does not divide the {chunks} batches of an epoch "
            f"({rollout_.groups} x {rollout_.images} images of {sizes} sizes, rollout.batch_size {rollout_.batch_size})"
        )
    steps = rollout_.num_inference_steps
    if config.algorithm == "grpo":
        return Turns(chunks, grpo.trained_steps(config.grpo, steps), rollout_.updates)
    return Turns(chunks, nft.levels(config.nft, steps)[1], rollout_.updates)


def on_policy(config: RlConfig) -> bool:
    """Whether the old policy is the trained one at every update, so that it needs no forward pass of its own."""
    return turns(config).updates == 1 and old_decay_kind(config) == 0


def old_decay_kind(config: RlConfig) -> int:
    """As in `NftConfig.old_decay`; Flow-GRPO draws with what was just trained."""
    return config.nft.old_decay if config.algorithm == "nft" else 0


def make_programs(config: RlConfig) -> step.Programs:
    """The programs of an update; what `lens-jax plan` lowers for devices that are not there."""
    static = step.StepConfig(
        ema_decay=config.ema_decay,
        skip_nonfinite=config.nonfinite == "skip",
        accumulation=turns(config).micro_steps,
        weigh=rl_loss.weigh,
    )
    if config.algorithm == "nft":
        loss = functools.partial(rl_loss.nft_loss, policy(config), config.nft, on_policy(config))
    else:
        guidance = config.rollout.guidance_scale
        loss = functools.partial(rl_loss.grpo_loss, policy(config), config.grpo, on_policy(config), guidance)
    optimizer = make_optimizer(config.optimizer, config.steps)
    return step.make_programs(static, loss, optimizer, learning_rate_schedule(config.optimizer, config.steps))


def make_follow(config: RlConfig):
    """state -> state after the last update of an epoch: the old policy follows what was trained. Jitted, donated."""
    name, kind = policy(config).trained, old_decay_kind(config)

    def follow(state: State) -> State:
        eta = nft.old_decay(kind, state.step)
        mix = lambda old, new: eta * old + (1 - eta) * new
        old = jax.tree.map(mix, state.extra["old"], state.params[name])
        return state.replace(extra={**state.extra, "old": old})

    return jax.jit(follow, donate_argnums=0)


def rollout_inputs(config: RlConfig, tokens: int) -> tuple[str, np.ndarray, np.ndarray | None, np.float32 | None]:
    """(solver, sigmas [steps + 1], levels [steps] or None, guidance or None) of images with so many tokens."""
    steps, guidance = config.rollout.num_inference_steps, config.rollout.guidance_scale
    scale = None if guidance == 1 else np.float32(guidance)
    sigmas = sampler.sigma_schedule(tokens, steps)
    if config.algorithm == "nft":
        return config.rollout.solver, sigmas, None, scale
    noisy = np.arange(steps) < grpo.trained_steps(config.grpo, steps)
    return rollout.SDE, sigmas, np.where(noisy, config.grpo.noise, 0).astype(np.float32), scale


@functools.lru_cache(maxsize=64)
def noisy_steps(config: RlConfig, tokens: int) -> sde.Step:
    """All steps of the SDE of images with so many tokens, on the host: sigma, the next one and the noise, [steps]."""
    _, sigmas, levels, _ = rollout_inputs(config, tokens)
    return jax.device_get(sde.steps_of(jnp.asarray(sigmas), jnp.asarray(levels)))
