"""A release small enough to train through: FLUX.2's autoencoder and GPT-OSS with the real vocabulary."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import pytest


@pytest.fixture(scope="session")
def small_release(goldens, release_tokenizer_folder, tmp_path_factory) -> Path:
    """The golden release's autoencoder, and a text encoder of four layers of width 64 that knows every token."""
    from lens_jax.convert import gpt_oss as convert
    from lens_jax.convert import writer
    from lens_jax.models import gpt_oss

    folder = tmp_path_factory.mktemp("small") / "release"
    for part in ("vae", "transformer", "scheduler"):
        shutil.copytree(goldens / "tiny_release" / part, folder / part)
    shutil.copy(goldens / "tiny_release" / "model_index.json", folder)
    shutil.copytree(release_tokenizer_folder, folder / "tokenizer")
    config = text_model()
    tensors = convert.to_release(config, gpt_oss.init(config, jax.random.key(0)))
    writer.write_folder(folder / "text_encoder", tensors, stem="model")
    (folder / "text_encoder" / "config.json").write_text(json.dumps(convert.config_to_release(config)))
    return folder


def text_model():
    from lens_jax.models.gpt_oss import GptOssConfig

    return GptOssConfig(
        layers=4, width=64, hidden=32, heads=8, kv_heads=2, head_dim=16, experts=8, dtype="float32",
        param_dtype="float32",
    )  # fmt: skip


@pytest.fixture(scope="session")
def small_lens(small_release, tiny_config, tmp_path_factory):
    """A run on that release's latents and features, of pictograms of 64 x 64 pixels and one more size."""
    from lens_jax.convert import autoencoder
    from lens_jax.data.prepare_scenes import OpenMojiConfig, prepare_openmoji
    from lens_jax.encoders.flux import FluxCodecConfig
    from lens_jax.encoders.gpt_oss import GptOssTextConfig
    from lens_jax.pretraining import config

    out = tmp_path_factory.mktemp("data") / "large"
    data = OpenMojiConfig(
        out=str(out), concepts=4, size=64, ratios=("1:1", "3:4"), tile=16, scenes=24, validation=6, copies=2,
        languages=("en", "de"), holdout_languages=(),
    )  # fmt: skip
    prepare_openmoji(data, progress=False)
    vae = autoencoder.read_config(small_release / "vae" / "config.json", dtype="float32", param_dtype="float32")
    model = dataclasses.replace(tiny_config.model, latent_channels=128, text_width=64, text_layers=2)
    return dataclasses.replace(
        tiny_config,
        model=model,
        codec=FluxCodecConfig(path=str(small_release), model=vae),
        text=GptOssTextConfig(
            path=str(small_release), model=text_model(), selected=(1, 3), max_conversation=97 + 22 + 26
        ),
        data=config.DataConfig(path=str(out), batch_size=4, pad_areas=True),
        samples=config.SheetConfig(every=8, prompts=("red apple", ""), sizes=("64x64",), num_inference_steps=2),
    )
