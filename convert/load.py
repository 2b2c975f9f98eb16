"""A `LensPipeline` from a release folder, or from one that was converted to our layout."""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import traverse_util

from lens_jax.convert import folder, native
from lens_jax.convert.native import COMPONENTS, Component
from lens_jax.convert.release import INDEX, VARIANTS, variant_of
from lens_jax.errors import LensError
from lens_jax.pipeline import LensPipeline
from lens_jax.text.gpt_oss import GptOssEncoder, GptOssEncoderConfig
from lens_jax.text.tokenizer import HarmonyTokenizer


def load_pipeline(
    path: Path, dtype: str | None = None, variant: str | None = None, date: str | None = None
) -> LensPipeline:
    """A pipeline from a release folder or its conversion.

    Args:
      dtype: what everything is computed in, and what denoiser and autoencoder are kept in (but for the autoencoder's
        statistics); by default bfloat16 on accelerators and float32 on a CPU.
      variant: "lens", "turbo" or "base", for the default steps and guidance; by default what the folder says.
      date: what the conversation around a prompt claims to be (see `text.gpt_oss`).

    A folder without `tokenizer/` gives a pipeline for `prompt_embeds` only. Raises LensError for what does not fit.
    """
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    converted = native.is_native(path)
    release = path / "release" if converted else path
    index = folder.read_json(release / INDEX)
    if index.get("_class_name") != "LensPipeline":
        raise LensError(f"{release / INDEX}: _class_name is {index.get('_class_name')!r:.80}; accepted: 'LensPipeline'")
    if converted and variant is None:
        variant = folder.read_json(path / native.MARK).get("variant")

    denoiser, autoencoder, text_encoder = COMPONENTS
    model, params = _load(denoiser, path, release, dtype)
    codec, codec_params = _load(autoencoder, path, release, dtype)
    selected = tuple(folder.read_json(release / denoiser.theirs / "config.json")["selected_layer_index"])
    encoder = _text_encoder(text_encoder, path, release, dtype, selected, date)
    if (model.text_width, model.text_layers) != (encoder.width, encoder.num_layers):
        raise LensError(
            f"{path}: the transformer reads {model.text_layers} layers of width {model.text_width}, the text encoder "
            f"gives {encoder.num_layers} of {encoder.width}"
        )
    defaults = VARIANTS[variant_of(path, variant)]
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


def _load(component: Component, path: Path, release: Path, dtype: str):
    """Config and parameters of the denoiser or the autoencoder, both in `dtype`."""
    config = component.module.read_config(release / component.theirs / "config.json", dtype=dtype, param_dtype=dtype)
    template = component.module.template(config)
    lazy = _leaves(component, config, path, template)
    leaves = {name: jnp.asarray(lazy[name], like.dtype) for name, like in template.items()}
    return config, traverse_util.unflatten_dict(leaves, sep="/")


def _leaves(component: Component, config, path: Path, template: dict, **options):
    """Our leaves by path, made from the release or read from our own layout."""
    if not native.is_native(path):
        where = path / component.theirs
        return component.module.leaves(config, folder.open_component(where), str(where), **options)
    where = path / component.ours
    lazy = folder.open_component(where)
    wrong = [name for name, like in template.items() if name not in lazy or lazy.shape(name) != tuple(like.shape)]
    if wrong:
        raise LensError(f"{where}: {len(wrong)} arrays are missing or misshapen: {', '.join(wrong[:8])}")
    return lazy


def _text_encoder(component: Component, path: Path, release: Path, dtype: str, selected, date) -> GptOssEncoder:
    gpt_oss = component.module
    config = gpt_oss.read_config(release / component.theirs / "config.json", dtype=dtype)
    # Features need neither the final norm nor the vocabulary head, 1.2 GB of it.
    template = gpt_oss.template(config, head=False)
    params = gpt_oss.to_device(_leaves(component, config, path, template, head=False), template)
    options = {} if date is None else {"date": date}
    tokenizer = HarmonyTokenizer.from_folder(release / "tokenizer") if (release / "tokenizer").is_dir() else None
    return GptOssEncoder(GptOssEncoderConfig(selected=selected, **options), config, params, tokenizer)
