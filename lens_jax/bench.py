"""`lens-jax bench`: speed as a ratio, measured in one run on one machine."""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from lens_jax import config as run_config
from lens_jax import flops
from lens_jax.console import make_console
from lens_jax.errors import LensError
from lens_jax.models import denoiser
from lens_jax.models.autoencoder import AutoencoderConfig, latent_grid
from lens_jax.models.denoiser import LENS, LENS_TOY
from lens_jax.models.layers import joint_positions
from lens_jax.training.optimizer import make_optimizer
from lens_jax.training.state import create_state
from lens_jax.training.step import StepConfig, train_step


@dataclasses.dataclass(frozen=True)
class TrainBench:
    """One optimiser step of a config on made-up data, beside a plain matrix product of the same machine."""

    # A config: a name that comes with the package, or a python file.
    config: str = "quickstart"
    # Rows and columns of latent tokens.
    grid: tuple[int, int] = (6, 6)
    # Samples a step; 0 takes the config's.
    batch_size: int = 0
    # Timed steps; the median is reported.
    repeats: int = 20
    # Side of the square float32 matrices of the plain product.
    matrix: int = 2048
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        for name in ("repeats", "matrix"):
            if getattr(self, name) < 1:
                raise LensError(f"--{name} is {getattr(self, name)}; it must be at least 1")


def bench_train(bench: TrainBench) -> dict:
    """Time the step and the product alternately, so that a busy machine slows both; print and return the figures."""
    config = run_config.load(bench.config)
    model, batch_size = config.model, bench.batch_size or config.data.batch_size
    tokens, text_tokens = bench.grid[0] * bench.grid[1], config.text.max_tokens
    optimizer = make_optimizer(config.optimizer, config.steps)
    step_config = StepConfig(model, config.flow, config.accumulation, config.ema_decay, config.nonfinite == "skip")
    step = jax.jit(functools.partial(train_step, step_config, optimizer), donate_argnums=0)
    codec = {"mean": np.zeros(model.latent_channels, np.float32), "std": np.ones(model.latent_channels, np.float32)}
    state = jax.jit(functools.partial(create_state, model, optimizer, seed=0))(codec)
    rng = np.random.default_rng(0)
    text = tuple(
        rng.standard_normal((batch_size, text_tokens, model.text_width), np.float32) for _ in range(model.text_layers)
    )
    batch = {
        "latents": rng.standard_normal((batch_size, tokens, model.latent_channels), np.float32),
        "text": text,
        "text_lengths": np.full(batch_size, text_tokens, np.int32),
        "positions": joint_positions(*bench.grid, text_tokens),
    }
    started = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - started
    matrix = jnp.ones((bench.matrix, bench.matrix), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(matrix))

    step_seconds, product_seconds = [], []
    for repeat in range(bench.repeats + 2):
        started = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        stepped = time.perf_counter()
        jax.block_until_ready(product(matrix))
        if repeat >= 2:  # the first runs touch fresh memory
            step_seconds.append(stepped - started)
            product_seconds.append(time.perf_counter() - stepped)

    operations = flops.train_step(model, tokens, text_tokens, batch_size)
    step_rate = operations / statistics.median(step_seconds)
    product_rate = 2 * bench.matrix**3 / statistics.median(product_seconds)
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "config": bench.config,
        "batch_size": batch_size,
        "image_tokens": tokens,
        "text_tokens": text_tokens,
        "compile_seconds": compile_seconds,
        "step_seconds": statistics.median(step_seconds),
        "images_per_second": batch_size / statistics.median(step_seconds),
        "step_gflops_per_second": step_rate / 1e9,
        "product_gflops_per_second": product_rate / 1e9,
        "ratio": step_rate / product_rate,
    }
    _report(result, "bench train", bench.json)
    return result


SIZES = {
    "lens": LENS,
    "toy": LENS_TOY,
    "tiny": dataclasses.replace(LENS, layers=4, heads=4),
}


@dataclasses.dataclass(frozen=True)
class DenoiserBench:
    """One forward pass of the denoiser with random weights."""

    # The released size (4.1B), the report's toy (1.2B), or four narrow blocks.
    size: Literal["lens", "toy", "tiny"] = "tiny"
    # Pixels of the picture; a latent token is 16 x 16 of them.
    height: int = 1024
    width: int = 1024
    # Text tokens; all of them valid.
    text_tokens: int = 128
    # Pictures at a time.
    batch_size: int = 1
    # What is computed in, and what the weights are kept in.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Attention kernel; auto is cuDNN on a GPU in half precision and XLA elsewhere.
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    # Lay the blocks out one after another instead of scanning them.
    unroll: bool = False
    # Timed passes; the median is reported.
    repeats: int = 20
    # Compile only: needs no memory for weights.
    compile_only: bool = False
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        for name in ("batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise LensError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.text_tokens < 0:
            raise LensError(f"--text-tokens is {self.text_tokens}; it must be at least 0")


def bench_denoiser(bench: DenoiserBench) -> dict:
    """Compile a forward pass, time it, print and return the figures; the share of peak only where the peak is known."""
    rows, columns = latent_grid(AutoencoderConfig(), bench.height, bench.width)
    options = {name: getattr(bench, name) for name in ("dtype", "attention", "unroll")}
    model = dataclasses.replace(SIZES[bench.size], param_dtype=bench.dtype, **options)
    shape = jax.ShapeDtypeStruct
    batch, tokens, dtype = bench.batch_size, rows * columns, jnp.dtype(bench.dtype)
    layer = shape((batch, bench.text_tokens, model.text_width), dtype)
    inputs = (
        shape((batch, tokens, model.latent_channels), dtype),
        (layer,) * model.text_layers,
        shape((batch,), jnp.int32),
        shape((batch,), jnp.float32),
        shape((tokens + bench.text_tokens, 3), jnp.int32),
    )
    started = time.perf_counter()
    lowered = jax.jit(functools.partial(denoiser.apply, model)).lower(denoiser.abstract_params(model), *inputs)
    traced = time.perf_counter()
    compiled = lowered.compile()
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "config": f"{bench.size}, {denoiser.parameter_count(model):,} parameters",
        "batch_size": batch,
        "image_tokens": tokens,
        "text_tokens": bench.text_tokens,
        "dtype": bench.dtype,
        "attention": bench.attention,
        "trace_seconds": traced - started,
        "compile_seconds": time.perf_counter() - traced,
        "temporary_megabytes": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "operations": batch * flops.denoiser_forward(model, tokens, bench.text_tokens),
    }
    if not bench.compile_only:
        params = jax.jit(functools.partial(denoiser.init, model))(jax.random.key(0))
        text = tuple(jax.random.normal(jax.random.key(i), layer.shape, dtype) for i in range(model.text_layers))
        latents = jax.random.normal(jax.random.key(9), inputs[0].shape, dtype)
        lengths, t = jnp.full(batch, bench.text_tokens, jnp.int32), jnp.full(batch, 0.5, jnp.float32)
        positions = jnp.asarray(joint_positions(rows, columns, bench.text_tokens))
        seconds = _median_seconds(lambda: compiled(params, latents, text, lengths, t, positions), bench.repeats)
        result["seconds"] = seconds
        result["tflops_per_second"] = result["operations"] / seconds / 1e12
        peak = flops.peak(jax.devices()[0].device_kind)
        if peak and bench.dtype == "bfloat16":
            result["share_of_peak"] = result["operations"] / seconds / peak
    _report(result, "bench denoiser", bench.json)
    return result


def _median_seconds(run: Callable, repeats: int) -> float:
    """Median time of `run` after three calls that warm it up."""
    seconds = []
    for repeat in range(repeats + 3):
        started = time.perf_counter()
        jax.block_until_ready(run())
        if repeat >= 3:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _report(result: dict, what: str, path: str) -> None:
    """A table on the console, and the figures as JSON where `path` says."""
    table = Table(title=f"{what}: {result['config']} on {result['device']}, jax {result['jax']}", show_header=False)
    for name, value in result.items():
        if name not in ("device", "jax", "config"):
            shown = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
            table.add_row(name.replace("_", " "), shown)
    make_console().print(table)
    if path:
        try:
            Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise LensError(f"{path}: cannot be written: {error.strerror}") from None
