"""`lens-jax bench train`: one optimiser step beside a plain matrix product, and beside PyTorch where asked to."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lens_jax import config as config_files
from lens_jax import flops
from lens_jax.bench import measure
from lens_jax.bench.sizes import SIZES, Size
from lens_jax.models import denoiser
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.layers import joint_positions
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.programs import step_config
from lens_jax.run.optimizer import make_optimizer
from lens_jax.run.state import create_state
from lens_jax.run.step import train_step


@dataclasses.dataclass(frozen=True)
class TrainBench:
    """One optimiser step on made-up data: forward, backward, clip, AdamW, moving average."""

    # A config: a name that comes with the package, or a python file.
    config: str = "quickstart"
    # Another size for its model, computed in the config's dtype.
    size: Literal["config"] | Size = "config"
    # Rows and columns of latent tokens.
    grid: tuple[int, int] = (6, 6)
    # Text tokens; 0 takes the config's.
    text_tokens: int = 0
    # Samples a step; 0 takes the config's.
    batch_size: int = 0
    # Blocks one after another, scanned, as the config has them, or both in turn.
    blocks: Literal["config", "unrolled", "scanned", "both"] = "config"
    # Timed steps; the median is reported.
    repeats: int = 20
    # Side of the square float32 matrices of the plain product.
    matrix: int = 2048
    # Time the same step in eager PyTorch in turn (needs the extra: parity).
    against: Literal["none", "torch"] = "none"
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "repeats", "matrix")


def bench_train(bench: TrainBench) -> dict:
    """Time step and product alternately, so that a busy machine slows all alike; print and return the figures."""
    config = config_files.load(bench.config, TrainConfig)
    if bench.size != "config":
        sizes = SIZES[bench.size].denoiser
        kept = {name: getattr(config.model, name) for name in ("dtype", "param_dtype", "remat", "unroll", "attention")}
        config = dataclasses.replace(config, model=dataclasses.replace(sizes, **kept))
    model, batch_size = config.model, bench.batch_size or config.data.batch_size
    tokens, text_tokens = bench.grid[0] * bench.grid[1], bench.text_tokens or config.text.max_tokens
    batch = _batch(model, bench.grid, text_tokens, batch_size)
    ours = "unrolled" if model.unroll else "scanned"
    wanted = {"config": (ours,), "both": ("unrolled", "scanned")}.get(bench.blocks, (bench.blocks,))
    matrix = jnp.ones((bench.matrix, bench.matrix), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    runs: dict[str, Callable] = {"product": lambda: product(matrix)}
    result = {
        "config": bench.config,
        "size": bench.size,
        "parameters": denoiser.parameter_count(model),
        "batch_size": batch_size,
        "image_tokens": tokens,
        "text_tokens": text_tokens,
    }
    for name in wanted:
        unroll = dataclasses.replace(model, unroll=name == "unrolled")
        runs[name], figures = _ours(dataclasses.replace(config, model=unroll), batch)
        result |= {f"{name}_{figure}": value for figure, value in figures.items()}
    if bench.against == "torch":
        from lens_jax.bench import against

        runs["torch"] = against.train(config, batch, bench.grid)
        result["against"] = against.versions("torch")
    seconds = measure.medians(runs, bench.repeats)
    operations = flops.train_step(model, tokens, text_tokens, batch_size)
    product_rate = 2 * bench.matrix**3 / seconds["product"]
    result["product_gflops_per_second"] = product_rate / 1e9
    for name in wanted:
        step_rate = operations / seconds[name]
        result |= {
            f"{name}_seconds": seconds[name],
            f"{name}_images_per_second": batch_size / seconds[name],
            f"{name}_gflops_per_second": step_rate / 1e9,
            f"{name}_ratio_to_product": step_rate / product_rate,
        }
    if "torch" in seconds:
        result["torch_seconds"] = seconds["torch"]
        result |= {f"{name}_ratio_to_torch": seconds[name] / seconds["torch"] for name in wanted}
    return measure.report(bench, result | measure.peak_memory())


def _batch(model: DenoiserConfig, grid: tuple[int, int], text_tokens: int, batch_size: int) -> dict:
    rng = np.random.default_rng(0)
    shape = (batch_size, text_tokens, model.text_width)
    return {
        "latents": rng.standard_normal((batch_size, grid[0] * grid[1], model.latent_channels), np.float32),
        "text": tuple(rng.standard_normal(shape, np.float32) for _ in range(model.text_layers)),
        "text_lengths": np.full(batch_size, text_tokens, np.int32),
        "positions": joint_positions(*grid, text_tokens),
    }


def _ours(config: TrainConfig, batch: dict) -> tuple[Callable, dict]:
    """(a run that takes a step, what compiling it took)."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = jax.jit(functools.partial(create_state, config.model, optimizer, {}, seed=0))()
    step = functools.partial(train_step, step_config(config), optimizer)
    program, figures = measure.compiled(step, state, batch, donate_argnums=0)

    def advance() -> dict:
        nonlocal state  # donated: each step uses up the one before
        state, metrics = program(state, batch)
        return metrics

    return advance, figures
