"""Fine-tuning of all parameters on your own captioned images at about 1024 x 1024, on a node of eight GPUs.

lens-jax prepare folder --path IMAGES --out data/mine --buckets lens-1024
lens-jax precompute finetune --data.path data/mine --out data/mine_features    # once; then no encoder is loaded
lens-jax train finetune --data.path data/mine_features --init-from checkpoints/Lens-Base

From Base, as others who fine-tune Lens do, and not from Turbo. 32 images an update, 20,000 updates; 1e-5 is half the
learning rate at which others fine-tune all of it. At 40 % of the peak of eight H100s that would take about 3 hours
(`lens-jax plan finetune --devices 8`). Not run by us.
"""

from lens_jax.encoders.flux import FluxCodecConfig
from lens_jax.encoders.gpt_oss import GptOssTextConfig
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.parallel import MeshConfig
from lens_jax.pretraining.config import DataConfig, TrainConfig, ValidationConfig
from lens_jax.run.config import CheckpointConfig, LoggingConfig
from lens_jax.run.optimizer import OptimizerConfig

config = TrainConfig(
    out="runs/finetune",
    steps=20_000,
    ema_decay=0.999,
    model=DenoiserConfig(),
    codec=FluxCodecConfig(),
    text=GptOssTextConfig(),
    data=DataConfig(
        path="data/mine_features", buckets=("lens-1024",), batch_size=32, pad_areas=True, joint_multiple=128, threads=8
    ),
    optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=200),
    mesh=MeshConfig(fsdp=-1),
    checkpoint=CheckpointConfig(every=1000, keep=2),
    validation=ValidationConfig(every=1000, batches=8),
    logging=LoggingConfig(every=20),
)
