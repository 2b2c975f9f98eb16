"""The three sizes a benchmark can have: the release, about the report's small model, and one for tests."""

import dataclasses
from typing import Literal

from lens_jax.models.autoencoder import AutoencoderConfig
from lens_jax.models.denoiser import LENS, LENS_TOY, DenoiserConfig
from lens_jax.models.gpt_oss import GPT_OSS_20B, GptOssConfig

Size = Literal["lens", "toy", "tiny"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Networks that fit together."""

    denoiser: DenoiserConfig
    text: GptOssConfig
    # Layers of the language model that the denoiser reads.
    selected: tuple[int, ...]
    autoencoder: AutoencoderConfig


SIZES: dict[Size, Sizes] = {
    "lens": Sizes(LENS, GPT_OSS_20B, (5, 11, 17, 23), AutoencoderConfig()),
    # The report's 1.2B reads one layer of width 1024; here of a GPT-OSS of that width.
    "toy": Sizes(
        LENS_TOY,
        dataclasses.replace(GPT_OSS_20B, layers=8, width=1024, hidden=1024, heads=16, kv_heads=2),
        (7,),
        AutoencoderConfig(),
    ),
    "tiny": Sizes(
        dataclasses.replace(LENS, layers=4, heads=4, text_width=256, text_layers=2),
        GptOssConfig(layers=4, width=256, hidden=256, heads=4, kv_heads=2, experts=8, vocab=1024),
        (1, 3),
        AutoencoderConfig(widths=(32, 64, 64, 64)),
    ),
}
