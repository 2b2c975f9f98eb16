"""`lens-jax bench train`: one optimiser step of a config beside a plain matrix product of the same machine."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lens_jax import config as run_config
from lens_jax import flops
from lens_jax.bench import measure
from lens_jax.models.layers import joint_positions
from lens_jax.training.optimizer import make_optimizer
from lens_jax.training.programs import step_config
from lens_jax.training.state import create_state
from lens_jax.training.step import train_step


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
        measure.check_positive(self, "repeats", "matrix")


def bench_train(bench: TrainBench) -> dict:
    """Time the step and the product alternately, so that a busy machine slows both; print and return the figures."""
    config = run_config.load(bench.config)
    model, batch_size = config.model, bench.batch_size or config.data.batch_size
    tokens, text_tokens = bench.grid[0] * bench.grid[1], config.text.max_tokens
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = functools.partial(train_step, step_config(config), optimizer)
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
    program, figures = measure.compiled(step, state, batch, donate_argnums=0)
    matrix = jnp.ones((bench.matrix, bench.matrix), jnp.float32)
    product = jax.jit(lambda x: x @ x)

    def advance() -> dict:
        nonlocal state  # donated: each step uses up the one before
        state, metrics = program(state, batch)
        return metrics

    seconds = measure.medians({"step": advance, "product": lambda: product(matrix)}, bench.repeats)
    step_rate = flops.train_step(model, tokens, text_tokens, batch_size) / seconds["step"]
    product_rate = 2 * bench.matrix**3 / seconds["product"]
    result = {
        "config": bench.config,
        "batch_size": batch_size,
        "image_tokens": tokens,
        "text_tokens": text_tokens,
        **figures,
        "seconds": seconds["step"],
        "images_per_second": batch_size / seconds["step"],
        "step_gflops_per_second": step_rate / 1e9,
        "product_gflops_per_second": product_rate / 1e9,
        "ratio": step_rate / product_rate,
        **measure.peak_memory(),
    }
    return measure.report(bench, result)
