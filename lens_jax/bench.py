"""`lens-jax bench`: speed as a ratio, measured in one run on one machine."""

import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from lens_jax import config as run_config
from lens_jax import flops
from lens_jax.console import make_console
from lens_jax.errors import LensError
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
    _print(result)
    if bench.json:
        Path(bench.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _print(result: dict) -> None:
    table = Table(
        title=f"bench train: {result['config']} on {result['device']}, jax {result['jax']}", show_header=False
    )
    for name, value in result.items():
        if name not in ("device", "jax", "config"):
            table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    make_console().print(table)
