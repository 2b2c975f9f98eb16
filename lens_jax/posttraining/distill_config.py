"""A run of few-step distillation, described by frozen dataclasses; every field is an option of the command line."""

import dataclasses
from typing import Literal

from lens_jax.data.config import DataConfig
from lens_jax.errors import LensError
from lens_jax.models.lora import LoraConfig
from lens_jax.posttraining.config import PosttrainingConfig
from lens_jax.pretraining.config import SheetConfig
from lens_jax.run.config import CheckpointConfig, at_least
from lens_jax.run.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """How the student's samples are drawn in training: by the steps that it will be deployed with."""

    # Steps of the student, on the noise levels that sampling has for so many. Report: 4.
    num_inference_steps: int = 4
    # From one step to the next as the sampler goes (euler), so that training and deployment share it; or from the clean
    # prediction with fresh noise (renoise), which is DMD2's. The report does not say.
    transition: Literal["euler", "renoise"] = "euler"
    # The step that is trained, uniform over all: one for a batch, or one for each sample. Those before it are then
    # computed for as many steps as the batch needs: of 4, 1.5 on average, or nearly always 3.
    trained_step: Literal["batch", "sample"] = "batch"

    def __post_init__(self):
        at_least("generator.", self, num_inference_steps=1)


@dataclasses.dataclass(frozen=True)
class MatchingConfig:
    """What pulls the student's samples: their distribution matched to the teacher's (DM), and its guidance (CA)."""

    # Weight of both terms together. Report: 0.1.
    weight: float = 0.1
    # Guidance that is distilled into the student: the guidance term is times this less 1. Report: 5.
    guidance_scale: float = 5.0
    # Rescale the guided prediction to the norm of the conditional one, as sampling does; the report's formula is plain.
    rescale: bool = False
    # Noise levels of the distribution term, uniform between these two: nearly all of them, whatever the student's step.
    dm_sigmas: tuple[float, float] = (0.02, 0.98)
    # Least noise level of the guidance term. The largest is that of the student's own input, which is noisier.
    ca_least_sigma: float = 0.02

    def __post_init__(self):
        if not self.weight >= 0:
            raise LensError(f"matching.weight is {self.weight}; it must be 0 or more")
        if not self.guidance_scale >= 1:
            raise LensError(f"matching.guidance_scale is {self.guidance_scale}; it must be at least 1, which is none")
        _check_range("matching.dm_sigmas", self.dm_sigmas)
        if not 0 < self.ca_least_sigma < 0.5:
            raise LensError(f"matching.ca_least_sigma is {self.ca_least_sigma}; it must be above 0 and below 0.5")


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    """The fake score: a denoiser that is trained on the student's samples all the time."""

    # Updates of the fake score and of the discriminator before each of the student. Report: 4.
    updates: int = 4
    # After each of the student, this share of the fake score becomes the student (IDA). Report: 0.03.
    mix: float = 0.03
    # Noise levels that fake score and discriminator are trained at, uniform between these two.
    sigmas: tuple[float, float] = (0.001, 0.999)

    def __post_init__(self):
        at_least("fake.", self, updates=1)
        if not 0 <= self.mix <= 1:
            raise LensError(f"fake.mix is {self.mix}; it must be from 0 (never) to 1 (all of it)")
        _check_range("fake.sigmas", self.sigmas)


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Heads on features of the frozen teacher, which tell noised images from noised samples."""

    # Weight of the student's term. Report: 0.001.
    weight: float = 0.001
    # Blocks of the teacher after which there is a head, counted from 1; () is the middle one. The report does not say.
    blocks: tuple[int, ...] = ()
    # Channels of a head, and groups that they are normalised in.
    width: int = 32
    groups: int = 8
    # Weight of the approximate R1 penalty. Report: 1.
    r1_gamma: float = 1.0
    # How much noise it adds to what is noised already. Report: 0.1.
    r1_alpha: float = 0.1

    def __post_init__(self):
        at_least("discriminator.", self, width=1, groups=1)
        if self.width % self.groups:
            raise LensError(f"discriminator.groups is {self.groups}, which does not divide the {self.width} channels")
        for name in ("weight", "r1_gamma", "r1_alpha"):
            if not getattr(self, name) >= 0:
                raise LensError(f"discriminator.{name} is {getattr(self, name)}; it must be 0 or more")
        if len(set(self.blocks)) < len(self.blocks):
            raise LensError(f"discriminator.blocks {self.blocks} has a block twice")


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """Before the distillation proper: the student regressed to the teacher's guided path. The report has none."""

    # Global steps of it, of a single update each; 0 leaves it out.
    steps: int = 0
    # Euler steps of the teacher for each of the student's.
    substeps: int = 5
    # The teacher's guidance.
    guidance_scale: float = 5.0
    # Learning rate of these steps.
    learning_rate: float = 1e-5

    def __post_init__(self):
        at_least("warm_start.", self, steps=0, substeps=1)
        if not self.guidance_scale >= 1:
            raise LensError(f"warm_start.guidance_scale is {self.guidance_scale}; it must be at least 1")
        if not self.learning_rate > 0:
            raise LensError(f"warm_start.learning_rate is {self.learning_rate}; it must be positive")


def _check_range(name: str, pair: tuple[float, float]) -> None:
    if not 0 < pair[0] < pair[1] < 1:
        raise LensError(f"{name} is {pair[0]} {pair[1]}; it must be two rising numbers between 0 and 1")


# AdamW (0, 0.9): without a first moment, so it takes no memory for one. The report has the rates and the betas, and
# nothing of decay and clip.
_REPORT = OptimizerConfig(learning_rate=5e-7, warmup_steps=0, beta1=0.0, beta2=0.9)


@dataclasses.dataclass(frozen=True)
class DistillConfig(PosttrainingConfig):
    """Few-step distillation of a denoiser. Defaults are the report's (its section 6)."""

    # Folder of the run: student, metrics, samples. A run that is there already goes on where it stopped.
    out: str = "runs/distill"
    # The teacher, which student and fake score start from: a run or one of its checkpoints, a packed run ("small" comes
    # with the package), a release folder or its conversion, or a file of weights.
    init_from: str = ""
    # An adapter that makes the teacher of it, such as a run of reinforcement learning: a run, a file or a folder of
    # PEFT. Empty is none.
    teacher_lora: str = ""
    # Global steps in all, each of `fake.updates` updates of fake score and discriminator and one of the student.
    # Report: at most 1,000.
    steps: int = 1000
    # Batches (micro-steps) summed into one update; their buckets are mixed.
    accumulation: int = 1
    # Decay of the moving average of the student, which is what is sampled. The report does not say.
    ema_decay: float = 0.99
    # Keep the average and the optimisers' moments, 12 bytes a parameter, in the host's memory, and copy them to the
    # devices and back in each update: all parameters on one device of 141 GB.
    offload: bool = False
    # Train adapters of student and fake score beside one frozen base, which is the teacher; rank 0 trains all
    # parameters of both, as the report does.
    lora: LoraConfig = LoraConfig()
    # The discriminator and its term. Without it (--no-gan) no images are needed.
    gan: bool = True
    # Without images: a JSON lines file of prompts, or a text file with one on each line, in place of `data`; batches
    # are then of `data.batch_size`.
    captions: str = ""
    # With `captions`: sizes HEIGHTxWIDTH or tables of them; a batch has any, all equally often. A plan takes them where
    # `data` is not there yet.
    sizes: tuple[str, ...] = ("lens-1024",)

    data: DataConfig = DataConfig(batch_size=32)
    generator: GeneratorConfig = GeneratorConfig()
    matching: MatchingConfig = MatchingConfig()
    fake: FakeConfig = FakeConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    # Sheets: fixed prompts in the student's steps, by its average and by itself, beside the teacher, whose steps and
    # guidance these are. With sheets or without, it also draws the first batch of a run by them, whose mean and std
    # those of the student's samples are told beside.
    samples: SheetConfig = SheetConfig(every=100)
    # Of the student, of the fake score, and of the discriminator's heads.
    optimizer: OptimizerConfig = _REPORT
    fake_optimizer: OptimizerConfig = _REPORT
    head_optimizer: OptimizerConfig = dataclasses.replace(_REPORT, learning_rate=1e-4)

    checkpoint: CheckpointConfig = CheckpointConfig(every=50)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The teacher's blocks after which there is a head, rising."""
        return tuple(sorted(self.discriminator.blocks)) or ((self.model.layers + 1) // 2,)

    @property
    def batches_per_step(self) -> int:
        """Of a global step that is not of the warm start."""
        return (self.fake.updates + 1) * self.accumulation

    def __post_init__(self):
        super().__post_init__()
        at_least("", self, accumulation=1)
        if self.captions and self.gan:
            raise LensError(
                f"captions is {self.captions}, but the discriminator needs images; give --no-gan, or images in data"
            )
        if not all(1 <= block <= self.model.layers for block in self.discriminator.blocks):
            raise LensError(
                f"discriminator.blocks {self.discriminator.blocks}: blocks are counted from 1 to model.layers "
                f"{self.model.layers}"
            )
        if self.warm_start.steps >= self.steps:
            raise LensError(
                f"warm_start.steps is {self.warm_start.steps}, which leaves none of all steps, {self.steps}, to distil"
            )
