"""The same bits from the same steps on a GPU too: what has to be given up for it, and how it is asked for.

On a CPU a program gives the same bits every time, and compilers for TPUs promise it. On a GPU two things do not: XLA
times several kernels for a product and takes the fastest of that day, and some kernels add in the order in which their
threads come, as the backward pass of cuDNN's attention does, for which JAX 0.10 has no switch.
"""

import dataclasses
import os

import jax

from lens_jax.errors import LensError
from lens_jax.pretraining.config import TrainConfig

FLAG = "--xla_gpu_deterministic_ops=true"


def set_flag() -> None:
    """Tell XLA, which reads its flags when the first device is asked for; call it before."""
    flags = os.environ.get("XLA_FLAGS", "")
    if FLAG.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}".strip()


def settle(config: TrainConfig) -> TrainConfig:
    """The config with what `deterministic` asks for; LensError where something else is wanted too."""
    if not config.deterministic or jax.default_backend() not in ("gpu", "cuda"):
        return config
    if FLAG not in os.environ.get("XLA_FLAGS", ""):
        raise LensError(f"deterministic: XLA has started without its flag; set XLA_FLAGS={FLAG} in the environment")
    if config.model.attention == "cudnn":
        raise LensError("deterministic: model.attention cudnn adds in any order; accepted: auto, xla")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
