"""`lens-jax bench denoiser`: one forward pass with random weights."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from lens_jax import flops
from lens_jax.bench import measure
from lens_jax.bench.sizes import SIZES, Size
from lens_jax.errors import LensError
from lens_jax.models import denoiser
from lens_jax.models.attention import Kernel
from lens_jax.models.autoencoder import AutoencoderConfig
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.latent_grid import latent_grid
from lens_jax.models.layers import joint_positions


@dataclasses.dataclass(frozen=True)
class DenoiserBench:
    """One forward pass of the denoiser with random weights: time to compile, memory, speed."""

    # The released size (4.1B), the report's small one (1.2B), or four narrow blocks.
    size: Size = "tiny"
    # Random weights of --size: the only ones there are, so this only says it.
    random_weights: bool = False
    # Blocks; 0 is as many as the size has.
    layers: int = 0
    # Pixels of the image; a latent token is 16 x 16 of them.
    height: int = 1024
    width: int = 1024
    # Text tokens; all of them valid.
    text_tokens: int = 128
    # Images at a time.
    batch_size: int = 1
    # What is computed in, and what the weights are kept in.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Attention kernel; auto is cuDNN on a GPU in half precision and XLA elsewhere.
    attention: Kernel = "auto"
    # Lay the blocks out one after another instead of scanning them.
    unroll: bool = False
    # Timed passes; the median is reported.
    repeats: int = 20
    # Compile only: needs no memory for weights.
    compile_only: bool = False
    # Time the same operations in eager PyTorch in turn (needs the extra: parity).
    against: Literal["none", "torch"] = "none"
    # Also trace one pass by the profiler, into this folder.
    profile: str = ""
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "batch_size", "repeats")
        for name in ("text_tokens", "layers"):
            if getattr(self, name) < 0:
                raise LensError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 0")


def denoiser_config(bench: DenoiserBench) -> DenoiserConfig:
    """The model of a benchmark."""
    options = {name: getattr(bench, name) for name in ("dtype", "attention", "unroll")}
    model = SIZES[bench.size].denoiser
    return dataclasses.replace(model, param_dtype=bench.dtype, layers=bench.layers or model.layers, **options)


def random_params(model: DenoiserConfig) -> dict:
    """Weights of a denoiser, drawn on the device in their own dtype."""
    draw = functools.partial(measure.random_weights, denoiser.abstract_params(model))
    return jax.jit(draw)(jax.random.key(0))


def bench_denoiser(bench: DenoiserBench, params: dict | None = None) -> dict:
    """Compile a forward pass, time it, print and return the figures.

    `params`: of `denoiser_config(bench)`, where a caller has them already; else random ones.
    """
    rows, columns = latent_grid(AutoencoderConfig(), bench.height, bench.width)
    model = denoiser_config(bench)
    batch, tokens, dtype = bench.batch_size, rows * columns, jnp.dtype(bench.dtype)
    shape = jax.ShapeDtypeStruct
    layer = shape((batch, bench.text_tokens, model.text_width), dtype)
    inputs = (
        shape((batch, tokens, model.latent_channels), dtype),
        (layer,) * model.text_layers,
        shape((batch,), jnp.int32),
        shape((batch,), jnp.float32),
        shape((tokens + bench.text_tokens, 3), jnp.int32),
    )
    apply = functools.partial(denoiser.apply, model)
    program, figures = measure.compiled(apply, denoiser.abstract_params(model), *inputs)
    result = {
        "parameters": denoiser.parameter_count(model),
        "image_tokens": tokens,
        "text_tokens": bench.text_tokens,
        "batch_size": batch,
        "dtype": bench.dtype,
        "attention": bench.attention,
        **figures,
        "operations": batch * flops.denoiser_forward(model, tokens, bench.text_tokens),
    }
    if bench.compile_only:
        return measure.report(bench, result)
    params = random_params(model) if params is None else params
    text = tuple(jax.random.normal(jax.random.key(i), layer.shape, dtype) for i in range(model.text_layers))
    latents = jax.random.normal(jax.random.key(9), inputs[0].shape, dtype)
    lengths, t = jnp.full(batch, bench.text_tokens, jnp.int32), jnp.full(batch, 0.5, jnp.float32)
    positions = jnp.asarray(joint_positions(rows, columns, bench.text_tokens))
    runs = {"jax": lambda: program(params, latents, text, lengths, t, positions)}
    if bench.against == "torch":
        from lens_jax.bench import against

        runs["torch"] = against.denoiser(model, latents, text, t, (rows, columns))
        result["against"] = against.versions("torch")
    seconds = measure.medians(runs, bench.repeats)
    with measure.traced(bench.profile):
        jax.block_until_ready(runs["jax"]())
    result["seconds"] = seconds["jax"]
    result |= measure.rate(result["operations"], seconds["jax"], bench.dtype) | measure.peak_memory()
    if "torch" in seconds:
        result |= {"torch_seconds": seconds["torch"], "ratio_to_torch": seconds["jax"] / seconds["torch"]}
    return measure.report(bench, result)
