"""A pre-training run, described by frozen dataclasses; every field is an option of the command line."""

import dataclasses
from typing import Any, Literal

from lens_jax.config import check_numbers, values
from lens_jax.data.config import DataConfig
from lens_jax.diffusion.flow import FlowConfig
from lens_jax.encoders import kinds
from lens_jax.encoders.linear import LinearCodecConfig
from lens_jax.encoders.sentence import SentenceEncoderConfig
from lens_jax.errors import LensError
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.lora import LoraConfig
from lens_jax.parallel import MeshConfig
from lens_jax.run.config import CheckpointConfig, LoggingConfig, ProfileConfig, at_least
from lens_jax.run.optimizer import OptimizerConfig


def check_run(config: Any) -> None:
    """LensError for what no run, whatever it trains, can have in its config."""
    check_numbers(config)
    at_least("", config, steps=1, heartbeat_seconds=1, seed=0)
    for name, value in values(config):
        # Steps and sizes are counted in 32 bits on the devices.
        if type(value) is int and value >= (1 << 32 if name.endswith("seed") else 1 << 31):
            raise LensError(f"{name} is {value}; it must be below {'2^32' if name.endswith('seed') else '2^31'}")
    if config.model.param_dtype != "float32":
        # In bfloat16 nine in ten of a kernel's numbers would never move at a rate of 1e-4, and at 5e-7 none.
        raise LensError(
            f"model.param_dtype is {config.model.param_dtype!r}; what is trained is kept in float32, whatever "
            "model.dtype is computed in"
        )
    if not 0 <= config.ema_decay < 1:
        raise LensError(f"ema_decay is {config.ema_decay}; it must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class SheetConfig:
    """Sheets of samples drawn from the moving average while training, from fixed noise."""

    # Draw after every so many steps; 0 draws none.
    every: int = 5000
    # One row a prompt.
    prompts: tuple[str, ...] = ()
    # One column a size, HEIGHTxWIDTH; empty means every bucket of the data set.
    sizes: tuple[str, ...] = ()
    # Euler steps.
    num_inference_steps: int = 20
    # Guidance; 1 turns it off. The run is drawn with it, and with as many steps, wherever nothing else is asked for.
    guidance_scale: float = 5.0
    # Seed of the noise.
    seed: int = 0

    def __post_init__(self):
        at_least("samples.", self, every=0, num_inference_steps=1, seed=0)

    def sampling(self) -> dict[str, Any]:
        """Steps and guidance, as a run's metadata has them."""
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """The loss of the moving average on held-out data, at fixed noise."""

    # Measure after every so many steps; 0 never does.
    every: int = 1000
    # Most batches used.
    batches: int = 16

    def __post_init__(self):
        at_least("validation.", self, every=0, batches=1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    # Folder of the run: checkpoints, metrics and samples. A run that is there already goes on where it stopped.
    out: str = "runs/lens"
    # Optimiser steps in all.
    steps: int = 400_000
    # Batches (micro-steps) summed into one update; their buckets, and so their areas, are mixed.
    accumulation: int = 1
    # What a batch counts in an update: as much as any other, which is what the report's ranks do, or by its images.
    weighting: Literal["batch", "image"] = "batch"
    # Decay of the moving average of the parameters, which is what is sampled.
    ema_decay: float = 0.9999
    # Keep the average and the optimiser's moments, 12 bytes a parameter, in the host's memory, and copy them to the
    # devices and back in each update: for few devices and many micro-steps.
    offload: bool = False
    # Root of all randomness.
    seed: int = 0
    # On a GPU, the same bits from the same steps, as a CPU and a TPU give anyway: XLA's attention in place of cuDNN's,
    # and no kernels chosen by timing. Slower, and by how much is not measured.
    deterministic: bool = False
    # What a new run starts from, instead of random parameters: a run or one of its checkpoints, a packed run ("small"
    # comes with the package), a release folder or its conversion, or a file of weights. A run that is there already
    # goes on from its own checkpoint.
    init_from: str = ""
    # Of a run: its moving average, or the parameters themselves.
    init_part: Literal["ema", "params"] = "ema"
    # Take what fits and leave the rest random, instead of refusing what does not fit in every array.
    init_partial: bool = False
    # Of several processes: seconds without a sign of life after which one counts as dead, and the others end.
    heartbeat_seconds: int = 100
    # A loss that is not finite ends the run before it is saved, or its step is skipped.
    nonfinite: Literal["stop", "skip"] = "stop"
    model: DenoiserConfig = DenoiserConfig()
    lora: LoraConfig = LoraConfig()
    codec: kinds.Images = LinearCodecConfig()
    text: kinds.Text = SentenceEncoderConfig()
    flow: FlowConfig = FlowConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    samples: SheetConfig = SheetConfig()
    validation: ValidationConfig = ValidationConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig = ProfileConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_run(self)
        at_least("", self, accumulation=1)
