"""`lens-jax bench sample`: a prompt to an image, end to end and by its three parts."""

import dataclasses
import functools
import time
from typing import Literal

import jax
import numpy as np

from lens_jax import flops
from lens_jax.bench import denoiser as denoiser_bench
from lens_jax.bench import distance, measure
from lens_jax.bench import text as text_bench
from lens_jax.bench.sizes import SIZES, Size
from lens_jax.encoders.flux import FluxCodecConfig
from lens_jax.encoders.gpt_oss import GptOssEncoder, GptOssTextConfig, encode_tokens
from lens_jax.encoders.harmony import PREFIX_TOKENS
from lens_jax.encoders.text import TextFeatures
from lens_jax.errors import LensError
from lens_jax.inference.pipeline import LensPipeline
from lens_jax.models import autoencoder, gpt_oss
from lens_jax.models.attention import Kernel
from lens_jax.models.latent_grid import latent_grid


@dataclasses.dataclass(frozen=True)
class SampleBench:
    """Token ids to uint8 images with the whole system: text encoder, denoising loop, decoder."""

    # A release folder, its conversion or a run; without one, random weights of --size.
    checkpoint: str = ""
    # Random weights of --size: the default, so this only says it.
    random_weights: bool = False
    # The release (20B text encoder, 4.1B denoiser), about the report's small model, or one for tests.
    size: Size = "tiny"
    # Pixels of the image.
    height: int = 1024
    width: int = 1024
    # Denoising steps.
    num_inference_steps: int = 20
    # Guidance; at 1 the unconditional branch is not run.
    guidance_scale: float = 5.0
    # Tokens of the prompt with the 22 behind it.
    text_tokens: int = 128
    # Images at a time, each of a prompt of its own.
    batch_size: int = 1
    # What is computed in, and what weights are kept in.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Attention kernel of the denoiser; auto is cuDNN on a GPU in half precision and XLA elsewhere.
    attention: Kernel = "auto"
    # Timed images; the median is reported.
    repeats: int = 5
    # Draw in float32 too, and say how far from it every stage and the image are. Needs --checkpoint: random weights
    # differ from dtype to dtype.
    against: Literal["none", "float32"] = "none"
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "num_inference_steps", "batch_size", "text_tokens", "repeats")
        if self.checkpoint and self.random_weights:
            raise LensError("give either --checkpoint or --random-weights")
        if self.against == "float32" and not self.checkpoint:
            raise LensError("--against float32 needs --checkpoint: random weights differ from dtype to dtype")


def bench_sample(bench: SampleBench, pipeline: LensPipeline | None = None) -> dict:
    """Draw images from made-up token ids, a new prompt each time; print and return the figures.

    `pipeline`: what draws, where a caller has it already.
    """
    if pipeline is None:
        pipeline = random_pipeline(bench) if not bench.checkpoint else _loaded_pipeline(bench)
    encoder = pipeline.text_encoder
    if not isinstance(encoder, GptOssEncoder):
        raise LensError(f"{bench.checkpoint}: its text encoder is not GPT-OSS; give a release or its conversion")
    grid = latent_grid(pipeline.codec, bench.height, bench.width)
    past = _past(encoder)
    rng = np.random.default_rng(0)
    draw = lambda: rng.integers(0, encoder.config.model.vocab, (bench.batch_size, bench.text_tokens))
    options = {
        "height": bench.height,
        "width": bench.width,
        "num_inference_steps": bench.num_inference_steps,
        "guidance_scale": bench.guidance_scale,
    }

    features = lambda: encode(encoder, draw(), past)
    known = features()
    noise = jax.random.normal(jax.random.key(0), (bench.batch_size, grid[0] * grid[1], pipeline.model.latent_channels))
    runs = {
        "end_to_end": lambda: pipeline(prompt_embeds=features(), output_type="pil", **options),
        "text": lambda: features().layers,
        "denoise": lambda: pipeline.denoise(noise, known, None, grid, **_steps(bench)),
        "decode": lambda: pipeline.decode(noise, grid, "pil"),
    }
    started = time.perf_counter()
    runs["end_to_end"]()
    first = time.perf_counter() - started
    seconds = measure.medians(runs, bench.repeats)
    passes = bench.num_inference_steps * flops.denoiser_forward(pipeline.model, grid[0] * grid[1], bench.text_tokens)
    if bench.guidance_scale != 1:
        passes += bench.num_inference_steps * flops.denoiser_forward(pipeline.model, grid[0] * grid[1], 0)
    rate = measure.rate(bench.batch_size * passes, seconds["denoise"], bench.dtype)
    result = {
        "pixels": f"{bench.height} x {bench.width}",
        "steps": bench.num_inference_steps,
        "guidance_scale": bench.guidance_scale,
        "text_tokens": bench.text_tokens,
        "batch_size": bench.batch_size,
        "dtype": bench.dtype,
        "attention": bench.attention,
        # With what was not compiled before, the denoising loop and the decoder.
        "first_image_seconds": first,
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "images_per_second": bench.batch_size / seconds["end_to_end"],
        **{f"denoise_{name}": value for name, value in rate.items()},
        **measure.peak_memory(),
    }
    if bench.against == "float32":
        result |= _distances(bench, pipeline, draw(), noise, grid)
    return measure.report(bench, result)


def encode(encoder: GptOssEncoder, ids: np.ndarray, past) -> TextFeatures:
    """Features of ids [B, T] behind a shared beginning."""
    lengths = np.full(len(ids), ids.shape[1], np.int32)
    layers = encode_tokens(encoder.config.model, encoder.model, ids, lengths, encoder.config.selected, past)
    return TextFeatures(tuple(layers), lengths)


def _distances(bench: SampleBench, pipeline: LensPipeline, ids: np.ndarray, noise, grid: tuple[int, int]) -> dict:
    """`distance.distances` from the same checkpoint in float32."""
    reference = _loaded_pipeline(dataclasses.replace(bench, dtype="float32"))
    features = lambda pipe: encode(pipe.text_encoder, ids, _past(pipe.text_encoder))
    found = distance.distances(pipeline, reference, features, noise, grid, **_steps(bench))
    return {f"{name}_from_float32": value for name, value in found.items()}


def _steps(bench: SampleBench) -> dict:
    return {"num_inference_steps": bench.num_inference_steps, "guidance_scale": bench.guidance_scale}


def _past(encoder: GptOssEncoder):
    """Keys and values of a shared beginning of as many tokens as the release's."""
    prefill = functools.partial(gpt_oss.prefill, encoder.config.model, layers=max(encoder.config.selected) + 1)
    return jax.jit(prefill)(encoder.model, jax.numpy.zeros(PREFIX_TOKENS, jax.numpy.int32))


def _loaded_pipeline(bench: SampleBench) -> LensPipeline:
    pipeline = LensPipeline.from_pretrained(bench.checkpoint, dtype=bench.dtype)
    model = dataclasses.replace(pipeline.model, attention=bench.attention)
    return dataclasses.replace(pipeline, model=model, batch_size=bench.batch_size)


def random_pipeline(bench: SampleBench) -> LensPipeline:
    """The whole system of `bench.size` with weights drawn on the device."""
    sizes = SIZES[bench.size]
    dtypes = {"dtype": bench.dtype, "param_dtype": bench.dtype}
    model = dataclasses.replace(sizes.denoiser, attention=bench.attention, **dtypes)
    images, text = (dataclasses.replace(config, **dtypes) for config in (sizes.autoencoder, sizes.text))
    text_config = GptOssTextConfig(selected=sizes.selected, model=text)
    encoder = GptOssEncoder(text_config, text_bench.random_params(text, head=False), tokenizer=None)
    return LensPipeline(
        model,
        FluxCodecConfig(model=images),
        encoder,
        denoiser_bench.random_params(model),
        jax.jit(functools.partial(autoencoder.init, images))(jax.random.key(0)),
        default_size=(bench.height, bench.width),
        batch_size=bench.batch_size,
    )
