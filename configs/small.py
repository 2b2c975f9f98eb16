"""The small Lens that comes with the package: 128 pictograms, scenes of up to four, written words.

lens-jax prepare openmoji --out data/small --concepts 128 --size 64 --ratios 1:1 3:4 4:3 2:3 3:2 --world all \\
  --scenes 100000 --copies 8 --densities 0.05 0.1 0.85 --natural 0.4 --hold-out --validation 1024
lens-jax train small
lens-jax convert pack runs/small small.safetensors

About 50 images a second on two AVX2 cores: two hours for these steps. How the weights that are shipped came about is in
docs/small_world.md; to go on from them: --init-from small.
"""

from lens_jax.encoders.linear import LinearCodecConfig
from lens_jax.encoders.sentence import SentenceEncoderConfig
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.pretraining.config import DataConfig, SheetConfig, TrainConfig, ValidationConfig
from lens_jax.run.config import CheckpointConfig, LoggingConfig
from lens_jax.run.optimizer import OptimizerConfig

config = TrainConfig(
    out="runs/small",
    steps=24_000,
    ema_decay=0.999,
    model=DenoiserConfig(
        layers=5,
        heads=3,
        latent_channels=80,
        text_width=512,
        text_layers=1,
        dtype="float32",
    ),
    codec=LinearCodecConfig(patch=8, components=80),
    text=SentenceEncoderConfig(max_tokens=10),
    data=DataConfig(path="data/small", batch_size=16, threads=1),
    optimizer=OptimizerConfig(learning_rate=1.3e-3, warmup_steps=200, schedule="cosine", beta2=0.99),
    checkpoint=CheckpointConfig(every=1000, keep=2),
    samples=SheetConfig(
        every=2000,
        guidance_scale=1.5,
        prompts=(
            "fox",
            "a small rocket on a pink background",
            "octopus (on the left), house (on the right), light blue background",
            "a banana above a blue book",
            "mushroom (three times), light green background",
            'the word "LENS", white background',
            'a cat and the word "TEA" at the bottom on a light yellow background',
        ),
    ),
    validation=ValidationConfig(every=2000),
    logging=LoggingConfig(every=100),
)
