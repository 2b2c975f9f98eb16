"""Shared by all tests: eight simulated CPU devices would slow single-device tests, so one device is the default."""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")


@pytest.fixture(scope="session")
def goldens() -> Path:
    return Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def pictograms(tmp_path_factory) -> Path:
    """A data set of eight concepts in three sizes."""
    from lens_jax.data.prepare import OpenMojiConfig, prepare_openmoji

    out = tmp_path_factory.mktemp("data") / "pictograms"
    return prepare_openmoji(
        OpenMojiConfig(
            out=str(out), concepts=8, size=16, scenes=60, validation=12, copies=2,
            languages=("en", "de", "it"), holdout_languages=("it",),
        ),
        progress=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_config(pictograms):
    """A run small enough to train in seconds; replace `out` in it."""
    from lens_jax import config
    from lens_jax.models.codec import PixelCodecConfig
    from lens_jax.models.denoiser import DenoiserConfig
    from lens_jax.training.optimizer import OptimizerConfig

    return config.TrainConfig(
        steps=8,
        accumulation=2,
        model=DenoiserConfig(
            layers=2, heads=2, head_dim=16, rope_axes=(4, 6, 6), latent_channels=48, text_width=512, text_layers=1,
            dtype="float32",
        ),
        codec=PixelCodecConfig(patch=4),
        data=config.DataConfig(path=str(pictograms), batch_size=4),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        checkpoint=config.CheckpointConfig(every=4, keep=2),
        samples=config.SampleConfig(every=8, prompts=("red apple", ""), num_inference_steps=2),
        validation=config.ValidationConfig(every=4, batches=2),
        logging=config.LoggingConfig(every=2, tensorboard=True),
    )  # fmt: skip
