"""The training step with as many blocks as fit into memory: areas, kernels and what the backward pass recomputes."""

import dataclasses
import functools
import gc

import jax

from lens_jax.bench import train
from lens_jax.bench.suite.case import Case, Setting
from lens_jax.bench.suite.kinds import check_device, kernel_here, memory_limit
from lens_jax.bench.suite.networks import TEXT_TOKENS
from lens_jax.bench.train import TrainBench, bench_train
from lens_jax.errors import LensError
from lens_jax.models.denoiser import KEPT
from lens_jax.planning import memory, program
from lens_jax.planning.estimate import bytes_of

# Images a step by the pixels of a side: about 24,000 image tokens, the share of one of the report's 128 devices.
_BATCH = {512: 24, 768: 10, 1024: 6}
# XLA's attention keeps all scores, so with it a step has fewer.
_XLA_BATCH = {512: 8, 768: 3, 1024: 1}
_BEST = "none"
_REMATS = tuple(KEPT)
_PLATFORMS = {"gpu": "cuda", "tpu": "tpu", "cpu": "cpu"}
# Of the memory that programs have, what the estimate may fill.
_FILL = 0.85


def cases(setting: Setting) -> list[Case]:
    check_device(setting)
    tiny = setting.size == "tiny"
    first = [(side, "auto", _BEST) for side in (1024, 512, 768)]
    more = [(side, "auto", remat) for remat in _REMATS if remat != _BEST for side in (1024, 512, 768)]
    more += [(side, "xla", remat) for side in (512, 1024, 768) for remat in _REMATS]
    if tiny:
        first, more = first[:1], [(1024, "xla", "none")]
    return [_case(tiny, *one) for one in (first if setting.part == "train" else more)]


def _case(tiny: bool, side: int, kernel: str, remat: str) -> Case:
    images = (_XLA_BATCH if kernel == "xla" else _BATCH)[side]
    options = {"size": "lens", "grid": (side // 16,) * 2, "batch_size": images, "text_tokens": TEXT_TOKENS}
    if tiny:
        side, images = 32, 2
        options = {"size": "tiny", "grid": (2, 2), "batch_size": images, "text_tokens": 3}
    fixed = {"config": "pretrain_512", "blocks": "scanned", "matrix": 0, "repeats": 2 if tiny else 6}
    bench = TrainBench(attention=kernel, remat=remat, **fixed, **options)
    name = f"{side}x{side}, {images} at a time, {kernel_here(kernel, 'bfloat16')}, remat {remat}"
    return Case(name, functools.partial(run, bench), least=5 if tiny else 35, most=120)


def run(bench: TrainBench) -> dict:
    """The figures of a step with as many blocks as fit; with fewer where the estimate was too bold."""
    limit = memory_limit()
    layers = blocks_that_fit(bench, limit)
    while True:
        if not layers:
            raise LensError(f"not one block fits into {(limit or 0) / 1e9:.1f} GB")
        try:
            result = bench_train(dataclasses.replace(bench, layers=layers))
            return {name.removeprefix("scanned_"): value for name, value in result.items()}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{layers} blocks do not fit: {str(error)[:300]}", flush=True)
        gc.collect()
        layers = layers * 3 // 4


def blocks_that_fit(bench: TrainBench, limit: int | None) -> int:
    """Blocks with which state, gradients and activations are estimated to fill a part of `limit` bytes; at most all."""
    whole = train.train_config(bench).model.layers
    if limit is None:
        return whole
    platform = _PLATFORMS[jax.default_backend()]
    few, more = (_bytes(dataclasses.replace(bench, layers=layers), platform) for layers in (2, 4))
    each = (more - few) / 2
    return int(max(0, min(whole, (_FILL * limit - (few - 2 * each)) // each)))


def _bytes(bench: TrainBench, platform: str) -> int:
    config = train.train_config(bench)
    step, create = train.step_and_state(config)
    state, batch = jax.eval_shape(create), train.made_up_batch(bench, config)
    return (
        bytes_of(state)
        + sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
        + memory.peak(program.trace(step, state, batch), platform).bytes
    )
