"""What a pre-training config makes: the state, the programs of a step, and what must fit together."""

import functools

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from lens_jax import parallel
from lens_jax.errors import LensError
from lens_jax.models import denoiser, lora
from lens_jax.pretraining import loss as losses
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.warm_start import cast
from lens_jax.run import step
from lens_jax.run.optimizer import learning_rate_schedule, make_optimizer
from lens_jax.run.state import State, Tree

RULES: parallel.Rules = {
    "denoiser": parallel.DENOISER_RULES,
    "lora": parallel.LORA_RULES,
    "codec": parallel.AUTOENCODER_RULES,
    "base": {"checksum": ()},
}


def create_state(config: TrainConfig, fitted: Tree, params: dict[str, jax.Array] | None = None) -> State:
    """A state at step 0. Pure, so `jax.eval_shape` of it describes a checkpoint.

    fitted: what the codec fitted to the data. params: the denoiser's by path, those that are not drawn at random.
    With `config.lora` the denoiser is frozen, in what it is computed in, and `extra` tells it from others.
    """
    key = jax.random.key(config.seed)
    drawn = flatten_dict(denoiser.init(config.model, jax.random.fold_in(key, 0)), sep="/")
    tree = {"denoiser": unflatten_dict(drawn | (params or {}), sep="/")}
    frozen, extra = {"codec": jax.tree.map(jnp.asarray, fitted)} if fitted else {}, {}
    if config.lora.rank:
        frozen |= {"denoiser": cast(tree["denoiser"], config.model.dtype)}
        tree = {"lora": lora.init(config.lora, frozen["denoiser"], jax.random.fold_in(key, 2))}
        extra = {"base": {"checksum": jnp.zeros((), jnp.uint32)}}
    return State(
        step=jnp.zeros((), jnp.int32),
        params=tree,
        frozen=frozen,
        # A copy: a donated state must not have an array twice.
        ema=jax.tree.map(jnp.copy, tree),
        opt_state=make_optimizer(config.optimizer, config.steps).init(tree),
        extra=extra,
        key=jax.random.fold_in(key, 1),
    )


def abstract_state(config: TrainConfig, mesh, offload: bool) -> State:
    """Shapes, dtypes and layouts of all that a run keeps on its devices, or offloads; `mesh` may be abstract."""
    create = functools.partial(create_state, config)
    return parallel.abstract(create, RULES, mesh, config.codec.abstract_fitted(), offload=offload)


def make_programs(config: TrainConfig) -> step.Programs:
    """The programs of a step; what `lens-jax plan` lowers for devices that are not there."""
    static = step.StepConfig(
        ema_decay=config.ema_decay,
        skip_nonfinite=config.nonfinite == "skip",
        accumulation=config.accumulation,
        weigh=_images if config.weighting == "image" else None,
        offload=config.offload,
    )
    options = {"lora": config.lora, "reduce_dtype": config.mesh.reduce_dtype}
    loss = functools.partial(losses.training_loss, config.model, config.flow, **options)
    optimizer = make_optimizer(config.optimizer, config.steps)
    return step.make_programs(static, loss, optimizer, learning_rate_schedule(config.optimizer, config.steps))


def _images(batch: step.Batch) -> float:
    return len(batch["latents"])


def make_validation_program(config: TrainConfig):
    """(params, frozen, batch, key) -> (weighted sum of losses, sum of weights)."""
    return jax.jit(functools.partial(losses.validation_loss, config.model, config.flow, config.lora))


def check_widths(config: TrainConfig) -> None:
    """The denoiser must take what the codec and the text encoder give."""
    pairs = {
        "model.latent_channels": (config.model.latent_channels, config.codec.latent_channels, "the codec"),
        "model.text_layers": (config.model.text_layers, config.text.num_layers, "the text encoder"),
        "model.text_width": (config.model.text_width, config.text.width, "the text encoder"),
    }
    for name, (wanted, given, source) in pairs.items():
        if wanted != given:
            raise LensError(f"{name} is {wanted}, but {source} gives {given}")
