"""`lens-jax bench train`: one optimiser step beside a plain matrix product, and beside PyTorch where asked to."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lens_jax import config as config_files
from lens_jax import flops
from lens_jax.bench import measure
from lens_jax.bench.sizes import SIZES, Size
from lens_jax.errors import LensError
from lens_jax.models import attention, denoiser, lora
from lens_jax.models.attention import Kernel
from lens_jax.models.denoiser import DenoiserConfig, Remat
from lens_jax.models.layers import joint_positions
from lens_jax.models.lora import LoraConfig
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.recipe import create_state, make_programs


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
    # Blocks of the model; 0 is as many as it has.
    layers: int = 0
    # What the backward pass recomputes, and the attention kernel; config is what the config says.
    remat: Literal["config"] | Remat = "config"
    attention: Literal["config"] | Kernel = "config"
    # Blocks one after another, scanned, as the config has them, or both in turn.
    blocks: Literal["config", "unrolled", "scanned", "both"] = "config"
    # Time the step of an adapter on attention and MLPs beside the full one, in turn.
    lora: bool = False
    # Its rank.
    lora_rank: int = 64
    # Timed steps; the median is reported.
    repeats: int = 20
    # Side of the square float32 matrices of the plain product; 0 leaves it out.
    matrix: int = 2048
    # Time the same step in eager PyTorch in turn (needs the extra: parity).
    against: Literal["none", "torch"] = "none"
    # Also trace one step by the profiler, into this folder.
    profile: str = ""
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "repeats", "lora_rank")
        for name in ("matrix", "layers", "text_tokens", "batch_size"):
            if getattr(self, name) < 0:
                raise LensError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 0")


def train_config(bench: TrainBench) -> TrainConfig:
    """The run whose step is timed."""
    config = config_files.load(bench.config, TrainConfig)
    model = config.model
    if bench.size != "config":
        kept = {name: getattr(model, name) for name in ("dtype", "param_dtype", "remat", "unroll", "attention")}
        model = dataclasses.replace(SIZES[bench.size].denoiser, **kept)
    changed = {name: getattr(bench, name) for name in ("remat", "attention") if getattr(bench, name) != "config"}
    model = dataclasses.replace(model, layers=bench.layers or model.layers, **changed)
    return dataclasses.replace(config, model=model)


def bench_train(bench: TrainBench) -> dict:
    """Time step and product alternately, so that a busy machine slows all alike; print and return the figures."""
    config = train_config(bench)
    model = config.model
    batch = jax.device_put(made_up_batch(bench, config))
    batch_size, tokens = batch["latents"].shape[:2]
    text_tokens = bench.text_tokens or config.text.max_tokens
    ours = "unrolled" if model.unroll else "scanned"
    wanted = {"config": (ours,), "both": ("unrolled", "scanned")}.get(bench.blocks, (bench.blocks,))
    runs: dict[str, Callable] = {}
    result = {
        "config": bench.config,
        "size": bench.size,
        "parameters": denoiser.parameter_count(model),
        "layers": model.layers,
        "remat": model.remat,
        "attention": model.attention,
        "batch_size": batch_size,
        "image_tokens": tokens,
        "text_tokens": text_tokens,
    }
    if bench.matrix:
        matrix = jnp.ones((bench.matrix, bench.matrix), jnp.float32)
        product = jax.jit(lambda x: x @ x)
        runs["product"] = lambda: product(matrix)
    for name in wanted:
        unroll = dataclasses.replace(model, unroll=name == "unrolled")
        runs[name], figures = _ours(dataclasses.replace(config, model=unroll), batch)
        result |= {f"{name}_{figure}": value for figure, value in figures.items()}
    if bench.lora:
        adapter = LoraConfig(rank=bench.lora_rank, targets=("attention", "mlp"))
        unroll = dataclasses.replace(model, unroll=wanted[0] == "unrolled")
        runs["lora"], figures = _ours(dataclasses.replace(config, model=unroll, lora=adapter), batch)
        result |= {f"lora_{figure}": value for figure, value in figures.items()}
        trained = lora.parameter_count(adapter, denoiser.abstract_params(model))
        result |= {"lora_rank": adapter.rank, "lora_parameters": trained}
        result["lora_share_of_parameters"] = trained / denoiser.parameter_count(model)
    if bench.against == "torch":
        from lens_jax.bench import against

        runs["torch"] = against.train(config, batch, bench.grid)
        result["against"] = against.versions("torch")
    seconds = measure.medians(runs, bench.repeats)
    with measure.traced(bench.profile):
        jax.block_until_ready(runs[wanted[0]]())
    operations = flops.train_step(model, tokens, text_tokens, batch_size)
    kernel = attention.resolve(model.attention, model.dtype, jax.default_backend())
    repeated = flops.recomputation(dataclasses.replace(model, attention=kernel), tokens, text_tokens, batch_size)
    if bench.matrix:
        product_rate = 2 * bench.matrix**3 / seconds["product"]
        result["product_gflops_per_second"] = product_rate / 1e9
    for name in wanted:
        rate = measure.rate(operations, seconds[name], model.dtype, operations + repeated)
        step_rate = operations / seconds[name]
        result |= {
            f"{name}_seconds": seconds[name],
            f"{name}_images_per_second": batch_size / seconds[name],
            f"{name}_gflops_per_second": step_rate / 1e9,
            **{f"{name}_{share}": rate[share] for share in ("mfu", "hfu") if share in rate},
        }
        if bench.matrix:
            result[f"{name}_ratio_to_product"] = step_rate / product_rate
    if bench.lora:
        result["lora_seconds"] = seconds["lora"]
        result |= {f"lora_ratio_to_{name}": seconds["lora"] / seconds[name] for name in wanted}
        counted = flops.train_step(model, tokens, text_tokens, batch_size, adapter)
        result["lora_ratio_of_operations"] = counted / operations
    if "torch" in seconds:
        result["torch_seconds"] = seconds["torch"]
        result |= {f"{name}_ratio_to_torch": seconds[name] / seconds["torch"] for name in wanted}
    return measure.report(bench, result | measure.peak_memory())


def made_up_batch(bench: TrainBench, config: TrainConfig) -> dict:
    """A batch of noise, as numpy arrays; every text token is valid."""
    text_tokens = bench.text_tokens or config.text.max_tokens
    return _batch(config.model, bench.grid, text_tokens, bench.batch_size or config.data.batch_size)


def _batch(model: DenoiserConfig, grid: tuple[int, int], text_tokens: int, batch_size: int) -> dict:
    rng = np.random.default_rng(0)
    shape = (batch_size, text_tokens, model.text_width)
    return {
        "latents": rng.standard_normal((batch_size, grid[0] * grid[1], model.latent_channels), np.float32),
        "text": tuple(rng.standard_normal(shape, np.float32) for _ in range(model.text_layers)),
        "text_lengths": np.full(batch_size, text_tokens, np.int32),
        "positions": joint_positions(*grid, text_tokens),
    }


def step_and_state(config: TrainConfig) -> tuple[Callable, Callable]:
    """(a step (state, batch) -> (state, metrics), what makes a state of random weights). Nothing is computed yet.

    All that the benchmarks know of the training core.
    """

    def create():
        weights = measure.random_weights(denoiser.abstract_params(config.model), jax.random.key(1))
        return create_state(config, {}, flatten_dict(weights, sep="/"))

    # Unjitted: it is compiled here, with what that takes.
    return make_programs(config).train_step.__wrapped__, create


def _ours(config: TrainConfig, batch: dict) -> tuple[Callable, dict]:
    """(a run that takes a step, what compiling it took)."""
    step, create = step_and_state(config)
    # Compiled before there is a state: a compiler that times its kernels needs memory for them.
    program, figures = measure.compiled(step, jax.eval_shape(create), batch, donate_argnums=0)
    state = jax.jit(create)()

    def advance() -> dict:
        nonlocal state  # donated: each step uses up the one before
        state, metrics = program(state, batch)
        return metrics

    return advance, figures
