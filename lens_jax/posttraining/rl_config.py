"""A run of reinforcement learning, described by frozen dataclasses; every field is an option of the command line."""

import dataclasses
from typing import Literal

from lens_jax.diffusion.sampler import Solver
from lens_jax.errors import LensError
from lens_jax.models.lora import LoraConfig
from lens_jax.posttraining.config import PosttrainingConfig
from lens_jax.posttraining.grpo import GrpoConfig
from lens_jax.posttraining.nft import NftConfig
from lens_jax.posttraining.rewards.combine import RewardsConfig
from lens_jax.pretraining.config import SheetConfig
from lens_jax.run.config import CheckpointConfig, at_least
from lens_jax.run.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """What an epoch draws before it is trained on: groups of images, a prompt each."""

    # Prompts an epoch, all different. Report: 48.
    groups: int = 48
    # Images of a prompt, which are compared with each other. Report: 24.
    images: int = 24
    # Sizes HEIGHTxWIDTH or tables of them; an image has any, all equally often. Report: the nine of 1024 x 1024.
    sizes: tuple[str, ...] = ("lens-1024",)
    # Images that are drawn, and trained on, at a time over all devices. This bounds their memory, whatever an epoch
    # has: the latents that were drawn wait in the host's memory, 2.2 MB an image of 1024 x 1024.
    batch_size: int = 64
    # dpm2, of second order, as the report and the reference code; Flow-GRPO has a sampler of its own.
    solver: Solver = "dpm2"
    # Steps. The reference code has 10, or 25 where several rewards are combined; the report does not say.
    num_inference_steps: int = 10
    # Guidance; 1 turns it off, as in the reference code. It is a free choice: what is learned is the difference between
    # images of the same prompt. The report does not say.
    guidance_scale: float = 1.0
    # Optimiser steps an epoch. Report: 1; the reference code takes 2 for a reward of text.
    updates: int = 1
    # Groups that may wait for their rewards before drawing waits too: 75 MB each of 24 images of 1024 x 1024.
    waiting: int = 48
    # Image and text tokens together are padded to a multiple of this; 128 suits accelerators.
    joint_multiple: int = 1

    def __post_init__(self):
        at_least(
            "rollout.", self, groups=1, batch_size=1, num_inference_steps=2, updates=1, waiting=1, joint_multiple=1
        )
        if self.images < 2:
            raise LensError(
                f"rollout.images is {self.images}; a group has at least 2 images, or there is nothing to compare"
            )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Rewards of the moving average on held-out prompts, before the first step and at times after."""

    # After every so many steps, and after the last; 0 never does.
    every: int = 30
    # The prompts, a JSON lines file like those that are trained on; empty evaluates nothing.
    prompts: str = ""
    # At most so many of them, the first ones; 0 is all.
    limit: int = 0
    # Images of each.
    images: int = 4
    # Steps of the release, and of the reference code when it evaluates.
    num_inference_steps: int = 40
    # Guidance; also the deployment's, 5, is worth looking at.
    guidance_scale: float = 1.0

    def __post_init__(self):
        at_least("evaluation.", self, every=0, limit=0, images=1, num_inference_steps=1)


@dataclasses.dataclass(frozen=True)
class RlConfig(PosttrainingConfig):
    """Reinforcement learning of a denoiser from rewards of its images. Defaults are the report's (its section 4)."""

    # Folder of the run: adapters, metrics, rewards, samples. A run that is there already goes on where it stopped.
    out: str = "runs/rl"
    # DiffusionNFT, as the report, or Flow-GRPO.
    algorithm: Literal["nft", "grpo"] = "nft"
    # Prompts with their rubrics, a JSON lines file (lens-jax prompts).
    prompts: str = ""
    # The report's ablations: a share of the prompts of each category, a smaller one within a larger one (0.25 and 0.5),
    # and categories that are left out. What is evaluated on stays the same.
    prompts_fraction: float = 1.0
    prompts_without: tuple[str, ...] = ()
    # Optimiser steps in all. Report: 180.
    steps: int = 180
    # Decay of the moving average, which is what is sampled and evaluated; the reference code has 0.9.
    ema_decay: float = 0.9
    # On a GPU, the same bits from the same steps, as a CPU and a TPU give anyway. Without it a resumed run may draw
    # images that differ in a bit, and asks for their rewards again.
    deterministic: bool = False
    # The adapter; rank 0 trains all parameters, which needs two more copies of them. The report has rank 64 and alpha
    # 128 and does not say where; the reference code adapts attention and MLPs.
    lora: LoraConfig = LoraConfig(rank=64, alpha=128, targets=("attention", "mlp"))

    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    nft: NftConfig = NftConfig()
    grpo: GrpoConfig = GrpoConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    samples: SheetConfig = SheetConfig(every=30)
    # AdamW (0.9, 0.999), 3e-4, decay 1e-4, clip 1: the report, and the reference code for the clip.
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, warmup_steps=0, weight_decay=1e-4)

    checkpoint: CheckpointConfig = CheckpointConfig(every=10)
