"""Stage 1 of the report's pre-training: 512 x 512 pixels, 400,000 updates of 3,072 images, from nothing.

lens-jax prepare folder --path IMAGES --out data/stage1 --buckets 512x512 \
    --caption-classes 128 160 216 256 288 344 --tokenizer checkpoints/Lens-Base/tokenizer
lens-jax plan pretrain_512 --hardware h100 --devices 128
srun lens-jax train pretrain_512                         # launch/ has the scripts

The report trained on 128 A100s (its section 3): constant rate 2e-4, AdamW (0.9, 0.999), clip 1, bfloat16, gradient
checkpointing, noise levels at mu 1.06. What it does not state is filled in with usual values: warm-up, decay, average,
and a tenth of the captions dropped. 1.34e22 operations: at 40 % of the peak of 128 H100s 73 hours, encoders not
counted. Not run by us.
"""

from lens_jax.data.buckets import CAPTION_CLASSES
from lens_jax.encoders.flux import FluxCodecConfig
from lens_jax.encoders.gpt_oss import GptOssTextConfig
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.parallel import MeshConfig
from lens_jax.pretraining.config import DataConfig, TrainConfig, ValidationConfig
from lens_jax.run.config import CheckpointConfig, LoggingConfig
from lens_jax.run.optimizer import OptimizerConfig

config = TrainConfig(
    out="runs/pretrain_512",
    steps=400_000,
    # Two halves of 1,536 leave room for what one whole would have to compute again: on 128 H100s nothing is.
    accumulation=2,
    ema_decay=0.9999,
    model=DenoiserConfig(),
    codec=FluxCodecConfig(),
    text=GptOssTextConfig(),
    data=DataConfig(
        path="data/stage1",
        buckets=("512x512",),
        caption_classes=CAPTION_CLASSES,
        batch_size=1536,
        pad_areas=True,
        joint_multiple=128,
        threads=16,
        prefetch=16,
    ),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=2000),
    # Weights are sharded within a node of eight and replicated across nodes.
    mesh=MeshConfig(data=-1, fsdp=8),
    checkpoint=CheckpointConfig(every=1000, keep=3),
    validation=ValidationConfig(every=5000, batches=8),
    logging=LoggingConfig(every=20),
)
