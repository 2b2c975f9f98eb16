"""A `LensPipeline` from a release folder, from one that was converted to our layout, or from parts of them."""

import tempfile
from pathlib import Path

import jax

from lens_jax.convert import gpt_oss, source
from lens_jax.convert.component import COMPONENTS
from lens_jax.convert.place import place
from lens_jax.convert.source import Part, Source
from lens_jax.encoders.gpt_oss import GptOssEncoder, GptOssEncoderConfig
from lens_jax.encoders.tokenizer import HarmonyTokenizer
from lens_jax.errors import LensError
from lens_jax.inference.pipeline import LensPipeline


def load_pipeline(
    path: Path,
    dtype: str | None = None,
    variant: str | None = None,
    date: str | None = None,
    original_truncation: bool = False,
    **parts,
) -> LensPipeline:
    """A pipeline from a release folder, its conversion, or weights.

    Args:
      dtype: what everything is computed in, and what denoiser and autoencoder are kept in (but for the autoencoder's
        statistics); by default bfloat16 on accelerators and float32 on a CPU.
      variant: "lens", "turbo" or "base", for the default steps and guidance; by default what the folder says.
      date: what the conversation around a prompt claims to be (see `text.gpt_oss`).
      original_truncation: cut a long prompt as the original does, with what follows it (see `text.gpt_oss`).
      parts: denoiser, autoencoder, text_encoder, tokenizer: paths, used instead of what `path` holds (`source.find`).

    Without a tokenizer a pipeline takes `prompt_embeds` only. Raises LensError for what does not fit or is not there.
    """
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    found = source.find(path, parts)
    missing = [component.ours for component in COMPONENTS if component.ours not in found.parts]
    if missing:
        raise LensError(f"{path}: holds no {' and no '.join(missing)}; give {'=..., '.join(missing)}=... beside it")
    denoiser = found.parts["denoiser"]
    model, params = _load(denoiser, dtype)
    codec, codec_params = _load(found.parts["autoencoder"], dtype)
    chat = {"original_truncation": original_truncation, **({} if date is None else {"date": date})}
    encoder = _text_encoder(found, dtype, selected=tuple(denoiser.values["selected_layer_index"]), **chat)
    if (model.text_width, model.text_layers) != (encoder.width, encoder.num_layers):
        raise LensError(
            f"{path}: the transformer reads {model.text_layers} layers of width {model.text_width}, the text encoder "
            f"gives {encoder.num_layers} of {encoder.width}"
        )
    _, defaults = source.variant_of(found, variant)
    return LensPipeline(
        model,
        codec,
        encoder,
        params,
        codec_params,
        # The release's own default, whatever the variant.
        default_size=(1024, 1024),
        batch_size=4,
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
    )


def find_part(path: str | Path, component: str) -> tuple[Source, Part]:
    """(source, part) of one network of a release folder, its conversion, or weights; LensError where not there."""
    found = source.find(Path(path))
    if component not in found.parts:
        raise LensError(f"{path}: holds no {component.replace('_', ' ')}; give a release folder")
    return found, found.parts[component]


def load_autoencoder(path: str | Path, dtype: str):
    """Config and parameters of the autoencoder that `find_part` finds."""
    return _load(find_part(path, "autoencoder")[1], dtype)


def load_text_encoder(path: str | Path, selected: tuple[int, ...], dtype: str, date: str) -> GptOssEncoder:
    """The text encoder that `find_part` finds, for those layers and that date."""
    return _text_encoder(find_part(path, "text_encoder")[0], dtype, selected=selected, date=date)


def _load(part: Part, dtype: str):
    """Config and parameters of the denoiser or the autoencoder, both in `dtype`."""
    config = part.config(dtype=dtype, param_dtype=dtype)
    return config, place(part.leaves(config), part.component.module.template(config))


def _text_encoder(found: Source, dtype: str, **options) -> GptOssEncoder:
    """`options` are fields of `GptOssEncoderConfig`."""
    encoder = GptOssEncoderConfig(**options)
    part = found.parts["text_encoder"]
    config = part.config(dtype=dtype)
    # Features need neither the final norm nor the vocabulary head, 1.2 GB of it.
    params = place(part.leaves(config, head=False), gpt_oss.template(config, head=False))
    return GptOssEncoder(encoder, config, params, tokenizer_of(found))


def tokenizer_of(found: Source) -> HarmonyTokenizer | None:
    """The tokenizer that came with a source, or None."""
    place = found.tokenizer
    if isinstance(place, bytes):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "tokenizer.json").write_bytes(place)
            return HarmonyTokenizer.from_folder(folder)
    if place:
        return HarmonyTokenizer.from_folder(place.parent)
    own = found.release and found.release / source.TOKENIZER
    return HarmonyTokenizer.from_folder(own) if own and own.is_dir() else None
