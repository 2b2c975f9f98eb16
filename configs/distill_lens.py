"""Lens becomes Lens-Turbo: the report's distillation (its section 6), at most 1,000 global steps on 8 GPUs.

lens-jax plan distill_lens --hardware a100-80 --devices 8
lens-jax distill distill_lens --init-from checkpoints/Lens --data.path data/curated

All parameters of student and fake score, batches of 32 over 8 devices, AdamW (0, 0.9) at 5e-7 and 1e-4 for the heads:
the report's. It has 100,000 curated pairs in buckets of several areas. Not said, with our choices: noise levels of the
terms, the student's step between its levels (Euler's, as it is sampled), where the heads are (the middle block), the
average (0.99). float32 masters, second moments and average are 82 GB, the teacher 8 and a gradient 16, sharded over
eight devices (`lens-jax plan`). Not run by us.
"""

from lens_jax.data.config import DataConfig
from lens_jax.encoders.flux import FluxCodecConfig
from lens_jax.encoders.gpt_oss import GptOssTextConfig
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.parallel import MeshConfig
from lens_jax.posttraining.distill_config import DistillConfig
from lens_jax.pretraining.config import SheetConfig
from lens_jax.run.config import CheckpointConfig, LoggingConfig

config = DistillConfig(
    out="runs/distill_lens",
    steps=1000,
    model=DenoiserConfig(),
    codec=FluxCodecConfig(),
    text=GptOssTextConfig(),
    data=DataConfig(path="data/curated", batch_size=32, pad_areas=True, joint_multiple=128),
    mesh=MeshConfig(data=1, fsdp=-1),
    checkpoint=CheckpointConfig(every=50, keep=3),
    samples=SheetConfig(
        every=100,
        prompts=(
            "a portrait of an old fisherman in morning light",
            "a lighthouse above a stormy sea, oil on canvas",
            'a chalkboard on which "four steps" is written',
        ),
    ),
    logging=LoggingConfig(every=1),
)
