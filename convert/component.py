"""The three networks of a release, and how each is known."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lens_jax.convert import autoencoder, denoiser, gpt_oss, text_layouts
from lens_jax.models.autoencoder import AutoencoderConfig
from lens_jax.models.denoiser import LENS
from lens_jax.models.gpt_oss import GPT_OSS_20B


@dataclasses.dataclass(frozen=True)
class Component:
    """One network of a release."""

    # Its folder in our layout and in the release.
    ours: str
    theirs: str
    # Names of its files there, before `.safetensors`.
    stem: str
    # The module with its table.
    module: Any
    # A tensor that it has and other networks have not: how its name ends.
    marks: tuple[str, ...]
    # What its config.json says it is.
    kind: tuple[str, str]
    # Its released size, for weights that come without a config.
    released: Any

    @property
    def title(self) -> str:
        """Its name in a message."""
        return self.ours.replace("_", " ")

    def config(self, release: Path, **options):
        """Its config, from the release's config.json in `release`."""
        return self.module.read_config(release / self.theirs / "config.json", **options)

    def is_in(self, tensors: Mapping) -> bool:
        """Whether a file with these tensors holds it, under whatever prefix."""
        return any(name.endswith(self.marks) for name in tensors)


COMPONENTS = (
    Component(
        ours="denoiser",
        theirs="transformer",
        stem="diffusion_pytorch_model",
        module=denoiser,
        # Qwen-Image, whose names are alike, has one `txt_norm`.
        marks=("txt_norm.0.weight",),
        kind=("_class_name", "LensTransformer2DModel"),
        released=LENS,
    ),
    Component(
        ours="autoencoder",
        theirs="vae",
        stem="diffusion_pytorch_model",
        module=autoencoder,
        # Autoencoders before that of FLUX.2 have no statistics.
        marks=("bn.running_mean",),
        kind=("_class_name", "AutoencoderKLFlux2"),
        released=AutoencoderConfig(),
    ),
    Component(
        ours="text_encoder",
        theirs="text_encoder",
        stem="model",
        module=gpt_oss,
        marks=(text_layouts.SINKS, *text_layouts.LLAMA_CPP, text_layouts.OPENAI),
        kind=("model_type", "gpt_oss"),
        released=GPT_OSS_20B,
    ),
)
