"""The small Lens that comes with the package, made to draw in four steps without guidance.

lens-jax prepare openmoji --out data/small ... (the command of configs/small.py)
lens-jax distill distill_small
lens-jax sample "three mushrooms" --checkpoint runs/distill_small

The report's recipe in small: four updates of fake score and discriminator to one of the student, guidance distilled at
the scale that the teacher is drawn with, a discriminator on the middle of its five blocks; after 60 steps of regression
to the teacher's path, which the report has not. The teacher is the variant after reinforcement learning
(configs/rl_small.py). Student and fake score are adapters beside it, so that the student is a file of a megabyte beside
the teacher's (`lens-jax convert pack --beside`). docs/distillation.md has what it gives.
"""

from lens_jax.configs.small import config as small
from lens_jax.data.config import DataConfig
from lens_jax.models.lora import LoraConfig
from lens_jax.posttraining.distill_config import (
    DiscriminatorConfig,
    DistillConfig,
    FakeConfig,
    MatchingConfig,
    WarmStartConfig,
)
from lens_jax.pretraining.config import SheetConfig
from lens_jax.run.config import CheckpointConfig, LoggingConfig
from lens_jax.run.optimizer import OptimizerConfig

config = DistillConfig(
    out="runs/distill_small",
    init_from="small/lens",
    steps=200,
    ema_decay=0.95,
    lora=LoraConfig(rank=16, alpha=32, targets=("attention", "mlp")),
    # Padded to as many tokens, the five sizes share a program of each update.
    data=DataConfig(path="data/small", batch_size=16, threads=1, pad_areas=True),
    sizes=("64x64", "72x56", "56x72", "80x56", "56x80"),
    matching=MatchingConfig(guidance_scale=small.samples.guidance_scale),
    fake=FakeConfig(updates=4, mix=0.03),
    discriminator=DiscriminatorConfig(width=16, groups=4),
    warm_start=WarmStartConfig(steps=60, substeps=5, guidance_scale=small.samples.guidance_scale, learning_rate=5e-4),
    model=small.model,
    codec=small.codec,
    text=small.text,
    # A rate that adapters are usual with; the report's is for all parameters of a model six hundred times as large.
    optimizer=OptimizerConfig(
        learning_rate=2e-4, warmup_steps=0, schedule="cosine", beta1=0.0, beta2=0.9, weight_decay=0.0
    ),
    fake_optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=0, beta1=0.0, beta2=0.9, weight_decay=0.0),
    head_optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, beta1=0.0, beta2=0.9, weight_decay=0.0),
    checkpoint=CheckpointConfig(every=50, keep=2),
    samples=SheetConfig(
        every=50, prompts=small.samples.prompts, sizes=("64x64",), guidance_scale=small.samples.guidance_scale
    ),
    logging=LoggingConfig(every=1),
)
