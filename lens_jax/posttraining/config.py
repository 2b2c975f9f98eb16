"""What runs of reinforcement learning and of distillation have in their configs alike."""

import dataclasses
from typing import Literal

from lens_jax.encoders import kinds
from lens_jax.encoders.linear import LinearCodecConfig
from lens_jax.encoders.sentence import SentenceEncoderConfig
from lens_jax.errors import LensError
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.lora import LoraConfig
from lens_jax.parallel import MeshConfig
from lens_jax.pretraining.config import SheetConfig, check_run
from lens_jax.run.config import CheckpointConfig, LoggingConfig, ProfileConfig
from lens_jax.run.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class PosttrainingConfig:
    """A run that begins with a trained denoiser."""

    # Folder of the run. A run that is there already goes on where it stopped.
    out: str = "runs/posttraining"
    # What it begins with: a run or one of its checkpoints, a packed run ("small" comes with the package), a release
    # folder or its conversion, or a file of weights.
    init_from: str = ""
    # Of a run: its moving average, or the parameters themselves.
    init_part: Literal["ema", "params"] = "ema"
    # Steps in all.
    steps: int = 1000
    # Decay of the moving average of what is trained, which is what is sampled.
    ema_decay: float = 0.99
    # Root of all randomness.
    seed: int = 0
    # On a GPU, the same bits from the same steps, as a CPU and a TPU give anyway.
    deterministic: bool = False
    # Of several processes: seconds without a sign of life after which one counts as dead, and the others end.
    heartbeat_seconds: int = 100
    # A loss that is not finite ends the run before it is saved, or its update is skipped.
    nonfinite: Literal["stop", "skip"] = "stop"
    # The adapter; rank 0 trains all parameters.
    lora: LoraConfig = LoraConfig()

    # Sheets: fixed prompts from fixed noise.
    samples: SheetConfig = SheetConfig()
    model: DenoiserConfig = DenoiserConfig()
    codec: kinds.Images = LinearCodecConfig()
    text: kinds.Text = SentenceEncoderConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig(every=1)
    profile: ProfileConfig = ProfileConfig()
    mesh: MeshConfig = MeshConfig()

    # Always the parameters that `init_from` has, all of them.
    init_partial = False

    def __post_init__(self):
        check_run(self)
        if self.mesh.sequence != 1:
            raise LensError(f"mesh.sequence is {self.mesh.sequence}; only pre-training shards the sequence, give 1")
        if self.lora.dropout:
            raise LensError(f"lora.dropout is {self.lora.dropout}; images are drawn without, so it must be 0 here")
