"""`lens-jax bench decode`: latents to images by the autoencoder with random weights."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from lens_jax import flops
from lens_jax.bench import measure
from lens_jax.bench.sizes import SIZES, Size
from lens_jax.models import autoencoder
from lens_jax.models.latent_grid import latent_grid


@dataclasses.dataclass(frozen=True)
class DecodeBench:
    """The autoencoder of the release with random weights: latents to images, or images to latents."""

    # lens and toy have the release's (84M parameters).
    size: Size = "lens"
    # Random weights of --size: the only ones there are, so this only says it.
    random_weights: bool = False
    # Pixels of the image.
    height: int = 1024
    width: int = 1024
    # Images at a time.
    batch_size: int = 1
    # Time images to latents instead.
    encode: bool = False
    # What is computed in, and what the weights are kept in.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Timed passes; the median is reported.
    repeats: int = 5
    # Time diffusers' eager model of the same sizes in turn (needs the extra: parity).
    against: Literal["none", "torch"] = "none"
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "batch_size", "repeats")


def bench_decode(bench: DecodeBench) -> dict:
    """Compile the decoder (or the encoder), time it, print and return the figures."""
    model = dataclasses.replace(SIZES[bench.size].autoencoder, dtype=bench.dtype, param_dtype=bench.dtype)
    grid = latent_grid(model, bench.height, bench.width)
    params = jax.jit(functools.partial(autoencoder.init, model))(jax.random.key(0))
    if bench.encode:
        shape = (bench.batch_size, bench.height, bench.width, 3)
        run, operations = functools.partial(autoencoder.encode, model), flops.autoencoder_encode(model, *grid)
    else:
        shape = (bench.batch_size, grid[0] * grid[1], model.latent_channels)
        run = functools.partial(autoencoder.decode, model, grid=grid)
        operations = flops.autoencoder_decode(model, *grid)
    inputs = jax.random.normal(jax.random.key(1), shape, jnp.dtype(bench.dtype))
    program, figures = measure.compiled(run, params, inputs)
    result = {
        "parameters": autoencoder.parameter_count(model),
        "direction": "encode" if bench.encode else "decode",
        "pixels": f"{bench.height} x {bench.width}",
        "batch_size": bench.batch_size,
        "dtype": bench.dtype,
        **figures,
    }
    runs = {"jax": lambda: program(params, inputs)}
    if bench.against == "torch":
        from lens_jax.bench import against

        runs["torch"] = against.autoencoder(model, bench.batch_size, grid, bench.encode)
        result["against"] = against.versions("torch", "diffusers")
    seconds = measure.medians(runs, bench.repeats)
    result["seconds"] = seconds["jax"]
    result |= measure.rate(bench.batch_size * operations, seconds["jax"], bench.dtype) | measure.peak_memory()
    if "torch" in seconds:
        result |= {"torch_seconds": seconds["torch"], "ratio_to_torch": seconds["jax"] / seconds["torch"]}
    return measure.report(bench, result)
