"""Few-step distillation before any device is paid for: its programs, what a device holds, and its work."""

import dataclasses

import jax
import numpy as np
from jax.sharding import AbstractMesh

from lens_jax import flops, parallel
from lens_jax.data.buckets import parse_buckets
from lens_jax.models import lora
from lens_jax.models.denoiser import KEPT
from lens_jax.planning import fit, lowering, memory
from lens_jax.planning.data import (
    CAPTION_TOKENS,
    BucketUse,
    DataUse,
    captions_use,
    data_use,
    has_data,
    largest_shapes,
)
from lens_jax.planning.estimate import bytes_of
from lens_jax.posttraining import distill_recipe as recipe
from lens_jax.posttraining.distill_config import DistillConfig
from lens_jax.posttraining.distill_networks import Networks
from lens_jax.run.state import State


def uses(config: DistillConfig, caption_tokens: int = CAPTION_TOKENS) -> DataUse:
    """The batches of a run. Of captions alone, and where neither data set nor data.buckets is there, of `sizes`."""
    if config.captions:
        return captions_use(config, parse_buckets(config.sizes), caption_tokens)
    if not config.data.buckets and not has_data(config.data):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=config.sizes))
    return data_use(config, 1, caption_tokens)


def choose_remat(
    config: DistillConfig, mesh: AbstractMesh | None, platform: lowering.Platform, usable: float
) -> DistillConfig:
    """The config with the remat that computes least again and fits into `usable` bytes, where it is left to us."""
    if config.model.remat != "auto":
        return config
    data = uses(config)
    for remat in KEPT:
        chosen = fit.with_remat(config, remat)
        if remat == "full" or peak_bytes(chosen, mesh, data, platform, usable) <= fit.FULL * usable:
            break
    return chosen


def _state(config: DistillConfig, mesh: AbstractMesh | None) -> State:
    # Without a mesh the memory of the host would be that of this machine.
    return recipe.abstract_state(dataclasses.replace(config, offload=config.offload and mesh is not None), mesh)


def trace(config: DistillConfig, mesh: AbstractMesh | None, use: BucketUse) -> dict[str, jax.stages.Traced]:
    """The programs of a global step by name, for batches of one shape; `config` is one of `lowering.on_platform`."""
    config = dataclasses.replace(config, offload=config.offload and mesh is not None)
    state, programs = _state(config, mesh), recipe.make_programs(config)
    batch = recipe.abstract_batch(config, use.images, use.tokens, mesh)
    kinds = {"fake score": programs.fake, "student": programs.student, "warm start": programs.warm_start}
    found = {}
    # Keys are made before: inside they would have to be placed on devices.
    with lowering.using(mesh), lowering.cudnn_anywhere(mesh):
        for name, made in kinds.items():
            if made is None:
                continue
            if config.accumulation == 1:
                found[f"{name}, step"] = made.train_step.trace(state, batch, 0)
                continue
            totals = jax.eval_shape(made.empty_totals, state, batch)
            found[f"{name}, micro-step"] = made.micro_step.trace(state, totals, batch, 0, 0)
            found[f"{name}, update"] = made.update.trace(state, totals)
    return found


def resident(config: DistillConfig, mesh: AbstractMesh | None, data: DataUse) -> dict[str, int]:
    """Bytes on one device of what is there throughout, by kind."""
    state, name = _state(config, mesh), Networks.of(config).student
    batches = [recipe.abstract_batch(config, use.images, use.tokens, mesh) for use in largest_shapes(data.buckets)]
    pixels = [
        bytes_of(lowering.abstract_pixels(use.images, use.bucket, mesh)) if config.gan and not data.cached else 0
        for use in largest_shapes(data.buckets)
    ]
    return {
        "teacher": bytes_of(state.frozen["teacher"]),
        "student": bytes_of(state.params[name]),
        "fake score": bytes_of(state.params["fake"]),
        "discriminator": bytes_of(state.params.get("head", {})),
        "average of the student": 0 if config.offload else bytes_of(state.ema),
        "moments": 0 if config.offload else bytes_of(state.opt_state),
        "accumulated gradients": bytes_of(state.params, itemsize=4) if config.accumulation > 1 else 0,
        "autoencoder": 0 if data.cached else bytes_of(config.codec.abstract_params(mesh)),
        "text encoder": 0 if data.cached else bytes_of(config.text.abstract_params(mesh)),
        # One is being worked on while the next is already sent to the devices.
        "batches": 2 * max(bytes_of(batch) + more for batch, more in zip(batches, pixels)),
    }


def host_bytes(config: DistillConfig, mesh: AbstractMesh | None) -> int:
    """Bytes that the host keeps for each of its devices."""
    state = _state(config, mesh)
    return bytes_of((state.ema, state.opt_state)) if config.offload else 0


def peak_bytes(config: DistillConfig, mesh: AbstractMesh | None, data: DataUse, platform, usable: float) -> int:
    """The most that one device holds. More than `usable` without the programs, they are not traced."""
    throughout = sum(resident(config, mesh, data).values())
    if throughout > usable:
        return throughout
    config = lowering.on_platform(config, platform)
    fullest = max(
        size
        for use in largest_shapes(data.buckets)
        for size in memory.peaks(trace(config, mesh, use), platform).values()
    )
    return throughout + fullest


@dataclasses.dataclass(frozen=True)
class Volume:
    """What one global step does, over all devices: operations of real tokens."""

    # Samples that the student draws, in all updates.
    images: float
    # Of the updates of fake score and discriminator, and of that of the student.
    fake: float
    student: float
    # What the backward passes compute again.
    recomputation: float
    # Of the frozen networks in front: images to latents, captions to features.
    encoders: float
    # Of fake score and student updates in forward passes of one image of one update; a backward pass counts two.
    passes: float
    # All of a step of the warm start, which has a single update; 0 without one.
    warm_start: float

    @property
    def operations(self) -> float:
        """Of a global step after the warm start."""
        return self.fake + self.student + self.recomputation + self.encoders


def volume(config: DistillConfig, data: DataUse) -> Volume:
    """Of one global step, on average over batches; `config` names the attention kernel."""
    parts = [(use.share, _volume(config, use, data.cached)) for use in data.buckets]
    total = lambda name: sum(share * getattr(part, name) for share, part in parts)
    return Volume(*(total(field.name) for field in dataclasses.fields(Volume)))


def _volume(config: DistillConfig, use: BucketUse, cached: bool) -> Volume:
    """On batches of one shape."""
    model, image, text = config.model, use.tokens.image, round(use.text)
    adapter = config.lora if config.lora.rank else lora.OFF
    added = flops.lora_forward(model, adapter, image, text) if adapter.rank else 0
    forward = flops.denoiser_forward(model, image, text)
    unconditional = flops.denoiser_forward(model, image, 0)
    trained = flops.train_step(model, image, text, 1, adapter)
    again = flops.recomputation(model, image, text, 1)
    # Features of the teacher are of its blocks up to the last head.
    lower = dataclasses.replace(model, layers=max(config.blocks))
    features = flops.denoiser_forward(lower, image, text) if config.gan else 0
    before, through = student_steps(config, use.images)

    noised = 2 + (config.discriminator.r1_gamma > 0)
    fake = through * (forward + added) + trained + noised * features
    guided = config.matching.guidance_scale != 1
    student = before * (forward + added) + trained + (forward + added) + forward + guided * (forward + unconditional)
    if config.gan:
        student += flops.input_backward(lower, image, text)
        again_student = again + flops.recomputation(lower, image, text, 1)
    else:
        again_student = again
    encoders = 0.0
    if not cached:
        encoders = config.text.operations(text) + (config.codec.operations(use.tokens.grid) if config.gan else 0)
    batch, updates = config.accumulation * use.images, config.fake.updates
    warm = config.warm_start
    path = warm.substeps * (forward + (warm.guidance_scale != 1) * unconditional)
    # The student's steps are computed again one by one, and within them what remat leaves out.
    regression = config.generator.num_inference_steps * (path + trained + (forward + added) + again)
    return Volume(
        images=batch * (updates + 1),
        fake=batch * updates * fake,
        student=batch * student,
        recomputation=batch * (updates * again + again_student),
        encoders=batch * (updates + 1) * encoders,
        passes=(updates * fake + student) / forward,
        warm_start=batch * (regression + encoders) if warm.steps else 0.0,
    )


def student_steps(config: DistillConfig, rows: int) -> tuple[float, float]:
    """Steps of the student, on average, before the one that is trained, and with it.

    A batch goes through as many as its latest row needs.
    """
    steps = config.generator.num_inference_steps
    if config.generator.trained_step == "sample":
        beyond = np.arange(steps) / steps
        through = float(np.sum(1 - beyond**rows))  # the expected largest of so many draws from 1 ... steps
    else:
        through = (steps + 1) / 2
    return through - 1, through


def check_shapes(config: DistillConfig, data: DataUse, mesh: AbstractMesh | None) -> None:
    """LensError where a batch cannot be split over the mesh."""
    for size in {use.images for use in data.buckets} if mesh is not None else ():
        parallel.check_batch_size(size, mesh)
