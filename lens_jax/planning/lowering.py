"""The programs of a run, traced and lowered for devices that are not there.

An abstract mesh stands for the devices and shapes for the arrays, so nothing is allocated and 1,024 devices take as
long as one. What is lowered is what the loop calls: the functions of `pretraining.recipe`.
"""

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from lens_jax import parallel
from lens_jax.data.buckets import Bucket
from lens_jax.errors import LensError
from lens_jax.models import attention
from lens_jax.parallel import AXES, MeshConfig
from lens_jax.pretraining import features
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.features import Tokens
from lens_jax.pretraining.recipe import make_programs
from lens_jax.run.state import State

Platform = Literal["cuda", "tpu"]
# The programs with the denoiser in them.
STEPS = ("train step", "micro-step", "rollout")


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh | None:
    """The mesh of a run on so many devices; None for one, which the loop runs without."""
    sizes = config.sizes(devices)
    return None if devices == 1 else AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def on_platform(config: TrainConfig, platform: Platform) -> TrainConfig:
    """The config with the attention kernel that `auto` would choose there: here it would choose this machine's."""
    kernel = attention.resolve(config.model.attention, config.model.dtype, platform)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention=kernel))


def trace(
    config: TrainConfig, mesh: AbstractMesh | Mesh | None, state: State, images: int, tokens: Tokens
) -> dict[str, jax.stages.Traced]:
    """The programs of one optimiser step on batches of `images` images (over all devices) of one shape, by name.

    `config` is one of `on_platform`. One program without accumulation, else two: the micro-step and the update.
    """
    programs = make_programs(config)
    batch = features.abstract_batch(config, images, tokens, mesh)
    # Keys are made before: inside they would have to be placed on devices.
    with using(mesh), cudnn_anywhere(mesh):
        if config.accumulation == 1:
            return {"train step": programs.train_step.trace(state, batch)}
        totals = jax.eval_shape(programs.empty_totals, state, batch)
        return {
            "micro-step": programs.micro_step.trace(state, totals, batch, 0),
            "update": programs.update.trace(state, totals),
        }


@dataclasses.dataclass(frozen=True)
class Lowered:
    """What came of lowering one program."""

    name: str
    # Attention kernel in it, None where it has no attention.
    kernel: attention.Kernel | None
    seconds: float
    # Characters of StableHLO.
    size: int
    # Of what the compiler made of it, where it was asked: bytes on one device besides the arguments, and its time.
    compiled_bytes: int | None = None
    compile_seconds: float | None = None


def lower(
    name: str, traced: jax.stages.Traced, mesh: AbstractMesh | Mesh | None, platform: Platform, compile: bool = False
) -> Lowered:
    """Lower a traced program for a platform, of which this machine need not have one, and compile it for `mesh`."""
    started = time.perf_counter()
    with using(mesh), cudnn_anywhere(mesh):
        lowered = traced.lower(lowering_platforms=(platform,))
        text = lowered.as_text()
    calls = {"cudnn": "__cudnn$fmha", "splash": "tpu_custom_call"}
    kernel = next((kernel for kernel, call in calls.items() if call in text), None)
    if kernel is None and name in STEPS:
        kernel = "xla"
    found = Lowered(name, kernel, time.perf_counter() - started, len(text))
    if not compile:
        return found
    started = time.perf_counter()
    with using(mesh):
        needed = _compiled_bytes(name, lowered)
    return dataclasses.replace(found, compiled_bytes=needed, compile_seconds=time.perf_counter() - started)


# What the TPU compiler says of a program whose temporary values alone do not fit, in GiB.
_TOO_LARGE = re.compile(r"required for HLO temporaries \(([\d.]+)G\)")


def _compiled_bytes(name: str, lowered: jax.stages.Lowered) -> int:
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        found = _TOO_LARGE.search(str(error))
        if found is None:
            raise LensError(f"{name}: the compiler says: {str(error).splitlines()[0]}") from None
        return round(float(found[1]) * 2**30)
    return memory.temp_size_in_bytes + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)


def using(mesh: AbstractMesh | Mesh | None):
    """A context in which a mesh is set, or none."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh)


@contextlib.contextmanager
def cudnn_anywhere(mesh: AbstractMesh | Mesh | None) -> Iterator[None]:
    """Let cuDNN's attention be lowered on a machine without a GPU.

    JAX 0.10.2 asks the installed cuDNN for its version and refuses an abstract mesh for it. Neither matters to us: the
    version is read for fp8 and one chip alone, and devices are needed where the kernel is partitioned, which inside
    `shard_map` it is not. Both are put back. Where JAX has these names no more, this does nothing.
    """
    try:
        from jax._src import dispatch
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        needing = dispatch.prim_requires_devices_during_lowering
        kernels = {cudnn._dot_product_attention_fwd_p_wrapper, cudnn._dot_product_attention_bwd_p_wrapper}
        found = cudnn.cuda_versions
    except (ImportError, AttributeError):
        yield
        return
    removed = kernels & needing if mesh else set()
    needing -= removed
    if found is None:
        cudnn.cuda_versions = _NoCudnn
    try:
        yield
    finally:
        cudnn.cuda_versions = found
        needing |= removed


class _NoCudnn:
    """In place of jaxlib's module for CUDA."""

    @staticmethod
    def cudnn_get_version() -> int:
        return 0


def abstract_pixels(images: int, bucket: Bucket, mesh: AbstractMesh | Mesh | None) -> jax.ShapeDtypeStruct:
    """A batch of images as it comes to the devices."""
    return parallel.abstract_array("pixels", (images, bucket.height, bucket.width, 3), jnp.uint8, mesh)


def trace_encoders(
    config: TrainConfig, mesh: AbstractMesh | Mesh | None, images: int, tokens: Tokens, bucket: Bucket
) -> dict[str, jax.stages.Traced]:
    """What is computed before a step, images to latents and captions to features, by name."""
    codec, text = config.codec, config.text
    pixels, step = abstract_pixels(images, bucket, mesh), jax.ShapeDtypeStruct((), jnp.int32)
    static = codec, tokens.padded, config.seed
    inputs = text.abstract_inputs(images)
    shape = (images, min(tokens.text, text.max_tokens), *inputs.shape[2:])
    values = parallel.abstract_array("text_inputs", shape, inputs.dtype, mesh)
    lengths = parallel.abstract_array("text_lengths", (images,), jnp.int32, mesh)
    codec_params, text_params = codec.abstract_params(mesh), text.abstract_params(mesh)
    with using(mesh):
        return {
            "codec": features.image_program.trace(*static, codec_params, pixels, step),
            "text encoder": features.text_program.trace(text, tokens.text, text_params, values, lengths),
        }
