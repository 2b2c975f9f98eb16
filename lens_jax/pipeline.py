"""LensPipeline: prompts to pictures, with diffusers' argument names."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lens_jax.diffusion import sampler
from lens_jax.errors import LensError
from lens_jax.models import codec, denoiser
from lens_jax.models.codec import PixelCodecConfig
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.layers import joint_positions
from lens_jax.text.encoder import TextEncoder, TextFeatures

OUTPUT_TYPES = ("pil", "np", "latent")


@dataclasses.dataclass(frozen=True)
class PipelineOutput:
    """What a call returns; image `i` belongs to prompt `i // num_images_per_prompt`."""

    # PIL images, float32 arrays [B, H, W, 3] in [0, 1], or latents [B, N, C].
    images: Any


@dataclasses.dataclass
class LensPipeline:
    """A denoiser, a codec and a text encoder, ready to draw.

    The image for (seed, index) is always the same: its noise depends on nothing else, and rows of a batch do not see
    each other.
    """

    model: DenoiserConfig
    codec: PixelCodecConfig
    text_encoder: TextEncoder
    # The denoiser's parameters, by default the moving average of a run.
    params: dict
    codec_params: dict
    # (height, width) when a call names none.
    default_size: tuple[int, int]
    # Images drawn at a time.
    batch_size: int = 16

    @classmethod
    def from_pretrained(cls, path: str | Path, **model_options) -> "LensPipeline":
        """From a run folder or one of its checkpoints; `model_options` replace fields of its model, e.g. dtype."""
        from lens_jax.text.sentence import SentenceEncoder
        from lens_jax.training import checkpoint

        folder = checkpoint.find(Path(path))
        metadata = checkpoint.read_metadata(folder)
        config = metadata["config"]
        model = dataclasses.replace(config.model, **model_options)
        ema = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), denoiser.abstract_params(model))
        parts = checkpoint.load_parts(folder, {"ema": ema, "codec": codec.abstract_params(config.codec)})
        params = jax.tree.map(lambda x: x.astype(model.param_dtype), parts["ema"])
        size = min(metadata["sizes"], key=lambda s: abs(np.log(s[0] / s[1])))
        return cls(model, config.codec, SentenceEncoder(config.text), params, parts["codec"], size)

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 5.0,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        latents: np.ndarray | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
        progress: Callable[[int, int], None] | None = None,
    ) -> PipelineOutput:
        """Draw `num_images_per_prompt` images for each prompt.

        Args:
          prompt: one prompt or several; a blank one is the unconditional case.
          negative_prompt: what guidance moves away from; blank or None is no text at all, as in the release.
          height, width: pixels; multiples of the codec's tile. Both default to the pipeline's size.
          guidance_scale: at 1 the unconditional branch is not run.
          seed: image i starts from noise that depends on (seed, i) and the number of latent tokens only.
          latents: that noise, given instead: [len(prompts) * num_images_per_prompt, N, C].
          output_type: "pil", "np" (float32 [0, 1]) or "latent" (normalised packed latents).
          progress: called with (images drawn, images in all) after each batch.

        Raises LensError for arguments that cannot be used.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, Sequence) or not prompts:
            raise LensError("prompt must be text or a non-empty list of texts")
        negatives = self._negatives(negative_prompt, len(prompts))
        if num_images_per_prompt < 1:
            raise LensError(f"num_images_per_prompt is {num_images_per_prompt}; it must be at least 1")
        if output_type not in OUTPUT_TYPES:
            raise LensError(f"output_type is {output_type!r}; accepted: {', '.join(OUTPUT_TYPES)}")
        if (height is None) != (width is None):
            raise LensError("give both height and width, or neither")
        size = self.default_size if height is None or width is None else (height, width)
        grid = codec.latent_grid(self.codec, *size)
        count = len(prompts) * num_images_per_prompt
        noise = self._noise(seed, count, grid) if latents is None else self._check_latents(latents, count, grid)

        text = _repeat(self.text_encoder.encode(prompts), num_images_per_prompt)
        negative = None
        if guidance_scale != 1 and any(n.strip() for n in negatives):
            negative = _repeat(self.text_encoder.encode(negatives), num_images_per_prompt)
        sigmas = sampler.sigma_schedule(grid[0] * grid[1], num_inference_steps)
        chunks = []
        for rows in _chunks(count, self.batch_size):
            unwanted = negative and _rows(negative, rows)
            chunks.append(self._draw(noise[rows], _rows(text, rows), unwanted, grid, sigmas, guidance_scale))
            if progress:
                progress(min(count, int(rows[0]) + len(rows)), count)
        final = np.concatenate(chunks)[:count]
        return PipelineOutput(self._finish(final, grid, output_type))

    def _negatives(self, negative_prompt, count: int) -> list[str]:
        negatives = negative_prompt if isinstance(negative_prompt, list | tuple) else [negative_prompt or ""] * count
        if len(negatives) != count:
            raise LensError(f"{len(negatives)} negative prompts for {count} prompts; give one, or one each")
        if not all(isinstance(n, str) for n in negatives):
            raise LensError("negative_prompt must be text")
        return list(negatives)

    def _noise(self, seed: int, count: int, grid: tuple[int, int]) -> np.ndarray:
        shape = (grid[0] * grid[1], self.model.latent_channels)
        draw = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape)
        return np.asarray(jax.vmap(draw)(jnp.arange(count)))

    def _check_latents(self, latents, count: int, grid: tuple[int, int]) -> np.ndarray:
        wanted = (count, grid[0] * grid[1], self.model.latent_channels)
        if np.shape(latents) != wanted:
            raise LensError(f"latents are {list(np.shape(latents))}; this call needs {list(wanted)}")
        return np.asarray(latents, np.float32)

    def _draw(self, noise, text: TextFeatures, negative: TextFeatures | None, grid, sigmas, guidance_scale):
        tokens = text.layers[0].shape[1]
        return np.asarray(
            _sample(
                self.model,
                guidance_scale != 1,
                self.params,
                noise,
                (text.layers, text.lengths),
                negative and (negative.layers, negative.lengths),
                joint_positions(*grid, tokens),
                sigmas,
                jnp.float32(guidance_scale),
            )
        )

    def _finish(self, latents: np.ndarray, grid: tuple[int, int], output_type: str):
        if output_type == "latent":
            return latents
        images = jax.jit(codec.decode, static_argnums=(0, 3))(self.codec, self.codec_params, latents, grid)
        if output_type == "np":
            return np.asarray((jnp.clip(images, -1, 1) + 1) / 2)
        return [Image.fromarray(image) for image in np.asarray(codec.to_uint8(images))]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(model: DenoiserConfig, guided: bool, params, noise, text, negative, positions, sigmas, guidance_scale):
    """Noise to final latents in one program; positions are an input, so sizes with as many tokens share it."""
    n_image = noise.shape[1]

    def velocity(x, t):
        conditional = denoiser.apply(model, params, x, *text, t, positions)
        if not guided:
            return conditional
        if negative is None:
            # No text at all: the image attends to itself, so the text stream need not be there.
            nothing = tuple(layer[:, :0] for layer in text[0]), jnp.zeros_like(text[1])
            unconditional = denoiser.apply(model, params, x, *nothing, t, positions[:n_image])
        else:
            unconditional = denoiser.apply(model, params, x, *negative, t, positions)
        return sampler.guide(conditional, unconditional, guidance_scale)

    return sampler.euler_sample(velocity, noise, sigmas)[0]


def _chunks(count: int, size: int) -> list[np.ndarray]:
    """Row numbers in chunks of one size, so that one program serves all; the last chunk repeats its last row."""
    size = min(size, count)
    return [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]


def _rows(features: TextFeatures, rows: np.ndarray) -> TextFeatures:
    return TextFeatures(tuple(layer[rows] for layer in features.layers), features.lengths[rows])


def _repeat(features: TextFeatures, times: int) -> TextFeatures:
    return _rows(features, np.repeat(np.arange(len(features.lengths)), times))
