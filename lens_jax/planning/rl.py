"""Reinforcement learning before any device is paid for: its programs, memory, work and questions to the judge."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from lens_jax import flops, parallel
from lens_jax.data.buckets import parse_buckets
from lens_jax.encoders.flux import FluxCodecConfig
from lens_jax.models import lora
from lens_jax.models.denoiser import KEPT
from lens_jax.planning import fit, lowering, memory
from lens_jax.planning.estimate import bytes_of
from lens_jax.posttraining import rl_recipe as recipe
from lens_jax.posttraining import rollout
from lens_jax.posttraining.rewards.rubric import RubricJudge
from lens_jax.posttraining.rl_config import RlConfig
from lens_jax.posttraining.rollout import Sizes

# Text tokens of a prompt: the report's have 30 to 60 words, about 60 tokens, and 22 stand behind every one.
PROMPT_TOKENS = 80
# Of the longest of a set.
LONGEST_PROMPT = 160
# Rubrics of a prompt: the report's ten and the one on structural integrity.
RUBRICS = 11


def sizes_of(config: RlConfig, longest: int = LONGEST_PROMPT) -> Sizes:
    """What is drawn, where the longest prompt has so many tokens."""
    room = min(longest, config.text.max_tokens)
    return rollout.make_sizes(config.codec, parse_buckets(config.rollout.sizes), room, config.rollout.joint_multiple)


def trace(config: RlConfig, mesh: AbstractMesh | None, sizes: Sizes) -> dict[str, jax.stages.Traced]:
    """The programs of an epoch by name, on shapes alone; `config` is one of `lowering.on_platform`."""
    state = recipe.abstract_state(config, mesh)
    images, channels = config.rollout.batch_size, config.model.latent_channels
    array = lambda name, shape, dtype=jnp.float32: parallel.abstract_array(name, shape, dtype, mesh)
    latents = array("latents", (images, sizes.padded, channels))
    layer = array("text", (images, sizes.text, config.text.width), config.text.dtype)
    read = {
        "text": (layer,) * config.text.num_layers,
        "text_lengths": array("text_lengths", (images,), jnp.int32),
        "positions": array("positions", (sizes.padded + sizes.text, 3), jnp.int32),
    }
    if any(sizes.tokens(i) != sizes.padded for i in range(len(sizes.grids))):
        read["n_image"] = array("n_image", (), jnp.int32)
    row, scalar = array("weight", (images,)), array("step", ())
    if config.algorithm == "nft":
        batch = {**read, "latents": latents, "t": row, "r": row, "weight": row}
    else:
        step = (scalar,) * 3
        batch = {**read, "latents": latents, "after": latents, "advantage": row, "weight": row, "step": step}
    fullest = max(range(len(sizes.grids)), key=sizes.tokens)
    solver, sigmas, levels, scale = recipe.rollout_inputs(config, sizes.tokens(fullest))
    programs = recipe.make_programs(config)
    fixed, keys = {**state.frozen, **state.extra}, array("keys", (images, 2), jnp.uint32)
    codec_params = state.frozen.get("codec") or config.codec.abstract_params(mesh)
    # Keys are made before: inside they would have to be placed on devices.
    with lowering.using(mesh), lowering.cudnn_anywhere(mesh):
        totals = jax.eval_shape(programs.empty_totals, state, batch)
        drawn = rollout.rollout_program.trace(
            recipe.policy(config), solver, fixed, state.extra["old"], {**read, "keys": keys}, sigmas, levels, scale
        )
        return {
            "rollout": drawn,
            "decode": rollout.decode_program.trace(config.codec, sizes.grids[fullest], codec_params, latents),
            "micro-step": programs.micro_step.trace(state, totals, batch, 0),
            "update": programs.update.trace(state, totals),
            "follow": recipe.make_follow(config).trace(state),
        }


def resident(config: RlConfig, mesh: AbstractMesh | None) -> dict[str, int]:
    """Bytes on one device of what is there throughout, by kind."""
    state = recipe.abstract_state(config, mesh)
    return {
        "frozen parameters": sum(bytes_of(state.frozen.get(name, {})) for name in ("denoiser", "reference")),
        "trained parameters": bytes_of(state.params),
        "old policy": bytes_of(state.extra["old"]),
        "average": bytes_of(state.ema),
        "optimiser": bytes_of(state.opt_state),
        "accumulated gradients": bytes_of(state.params, itemsize=4),
        "autoencoder": bytes_of(state.frozen.get("codec") or config.codec.abstract_params(mesh)),
        "text encoder": bytes_of(config.text.abstract_params(mesh)),
    }


def host_bytes(config: RlConfig, sizes: Sizes, devices: int) -> int:
    """Bytes of latents that the host keeps for each of its devices, until an epoch has been trained on."""
    kept = 1 if config.algorithm == "nft" else config.rollout.num_inference_steps + 1
    images = recipe.turns(config).chunks * config.rollout.batch_size
    return images * kept * sizes.padded * config.model.latent_channels * 4 // devices


def choose_remat(config: RlConfig, mesh: AbstractMesh | None, platform: lowering.Platform, usable: float) -> RlConfig:
    """The config with the remat that computes least again and fits into `usable` bytes, where it is left to us."""
    if config.model.remat != "auto":
        return config
    throughout = sum(resident(config, mesh).values())
    for remat in KEPT:
        chosen = fit.with_remat(config, remat)
        if remat == "full":
            break
        # The longest prompt is not known yet; it is a small part of what is attended to.
        traced = trace(lowering.on_platform(chosen, platform), mesh, sizes_of(config))
        if throughout + memory.peaks({"": traced["micro-step"]}, platform)[""] <= fit.FULL * usable:
            break
    return chosen


@dataclasses.dataclass(frozen=True)
class Volume:
    """What one optimiser step does, over all devices."""

    images: float
    # Questions to judges of rubrics.
    judge_calls: float
    # Operations of the denoiser: drawing; trained, old and reference policy on the noise levels of each image.
    drawing: float
    training: float
    # What the backward pass computes again.
    recomputation: float
    # Decoding images, and encoding prompts.
    encoders: float

    @property
    def operations(self) -> float:
        return self.drawing + self.training + self.recomputation + self.encoders


def volume(config: RlConfig, sizes: Sizes, prompt_tokens: int = PROMPT_TOKENS, rubrics: int = RUBRICS) -> Volume:
    """Of one optimiser step; `config` names the attention kernel. Real tokens of images and prompts are counted."""
    rollout_, turns, model = config.rollout, recipe.turns(config), config.model
    per_update = rollout_.groups * rollout_.images / turns.updates
    text = min(prompt_tokens, config.text.max_tokens)
    mean = lambda count: float(np.mean([count(sizes.tokens(i)) for i in range(len(sizes.grids))]))
    forward = mean(lambda image: flops.denoiser_forward(model, image, text))
    adapter = config.lora if config.lora.rank else lora.OFF
    added = mean(lambda image: flops.lora_forward(model, adapter, image, text)) if adapter.rank else 0
    unguided = mean(lambda image: flops.denoiser_forward(model, image, 0))
    guided = rollout_.guidance_scale != 1
    drawing = rollout_.num_inference_steps * (forward + added + guided * (unguided + added))
    # Flow-GRPO compares steps as they were drawn; DiffusionNFT trains without guidance.
    unguided_too = guided and config.algorithm == "grpo"
    texts = (text, 0) if unguided_too else (text,)
    fixed = forward + unguided_too * unguided
    old = 0 if recipe.on_policy(config) else fixed + len(texts) * added
    reference = fixed if recipe.kl(config) else 0
    trained = sum(mean(lambda image, text=text: flops.train_step(model, image, text, 1, adapter)) for text in texts)
    again = sum(mean(lambda image, text=text: flops.recomputation(model, image, text, 1)) for text in texts)
    decode = 0.0
    if isinstance(config.codec, FluxCodecConfig):
        decode = float(np.mean([flops.autoencoder_decode(config.codec.model, *grid) for grid in sizes.grids]))
    prompts = rollout_.groups / turns.updates * config.text.operations(text)
    return Volume(
        images=per_update,
        judge_calls=per_update * calls_per_image(config, rubrics),
        drawing=per_update * drawing,
        training=per_update * turns.levels * (trained + old + reference),
        recomputation=per_update * turns.levels * again,
        encoders=per_update * decode + prompts,
    )


def calls_per_image(config: RlConfig, rubrics: int) -> int:
    """Questions about an image to judges of rubrics; other rewards are no model that is paid by the call."""
    judges = [one.reward for one in config.rewards.train if isinstance(one.reward, RubricJudge)]
    return sum(rubrics if judge.call == "each" else 1 for judge in judges)
