"""LensPipeline: prompts to images, with diffusers' argument names."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from lens_jax import parallel
from lens_jax.convert.lora import Adapter
from lens_jax.data.buckets import LENS_1024, LENS_1440, RATIOS
from lens_jax.diffusion import draw
from lens_jax.diffusion.sampler import SOLVERS, Solver
from lens_jax.encoders.images import ImageCodec, decode_program
from lens_jax.encoders.text import TextEncoder, TextFeatures, check_prompts
from lens_jax.errors import LensError, LensWarning
from lens_jax.inference import arguments, lora, memory
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.latent_grid import latent_grid
from lens_jax.posttraining import adapters
from lens_jax.posttraining.adapters import Loaded
from lens_jax.reasoner.rewrite import Reasoner, Rewrite

# An area further than this factor from those of training is warned of. The small model draws 14 of 28 images right at
# 1.4 times its area (docs/small_world.md), and at four times hardly anything.
_FAR = 2
OUTPUT_TYPES = ("pil", "np", "latent")
# The sizes the release offers, by base resolution, in the order of RATIOS.
OFFERED = {1024: LENS_1024, 1440: LENS_1440}


@dataclasses.dataclass(frozen=True)
class PipelineOutput:
    """What a call returns; image `i` belongs to prompt `i // num_images_per_prompt`."""

    # PIL images, float32 arrays [B, H, W, 3] in [0, 1], or latents [B, N, C].
    images: Any
    # The day the conversation around the prompts claimed to be; None for text encoders that have none.
    date: str | None = None
    # What was drawn of each prompt; None where features were given instead.
    prompts: list[str] | None = None
    # What a reasoner made of each prompt, and why where it made nothing; None where none was asked.
    rewrites: list[Rewrite] | None = None


@dataclasses.dataclass
class LensPipeline:
    """A denoiser, a codec and a text encoder, ready to draw.

    The image for (seed, index) is always the same: its noise depends on nothing else, and rows of a batch do not see
    each other.
    """

    model: DenoiserConfig
    codec: ImageCodec
    # None where every call brings prompt_embeds.
    text_encoder: TextEncoder | None
    # The denoiser's parameters, by default the moving average of a run.
    params: dict
    codec_params: dict
    # (height, width) when a call names none.
    default_size: tuple[int, int]
    # Images drawn at a time.
    batch_size: int = 16
    # Steps and guidance when a call names none.
    num_inference_steps: int = 20
    guidance_scale: float = 5.0
    # Where there is one, all parameters are laid out on it, each device draws its images, and every process of it must
    # make the same calls.
    mesh: Mesh | None = None
    # Adapters that are applied: added to what the parameters compute (`load_lora_weights`).
    adapters: list[Loaded] = dataclasses.field(default_factory=list)
    # Rewrites prompts before they are drawn; negative ones never.
    reasoner: Reasoner | None = None
    # Pixels of the smallest and of the largest image that it was trained on, where that is known.
    trained_areas: tuple[int, int] | None = None

    @classmethod
    def from_pretrained(cls, path: str | Path, **options) -> "LensPipeline":
        """From a run folder, one of its checkpoints, a release folder, its conversion, or a file of weights.

        `options` are the keyword arguments of `inference.load.from_run` or of `inference.load.from_release`: dtype,
        mesh, date, other places of the encoders, and more.
        """
        from lens_jax.inference import load

        return load.from_pretrained(path, **options)

    def __post_init__(self):
        # All adapters as one, and what the parameters were before something was merged into them.
        self._lora, self._unmerged = adapters.joined(self.adapters, self.mesh), None

    def load_lora_weights(self, path: str | Path, scale: float = 1.0) -> None:
        """Apply an adapter, beside those that are applied: a file, a PEFT folder, or a run that trained one.

        Switching to another of the same rank and layers compiles nothing anew. A LoKr, which is of full rank, is merged
        into the parameters. LensError for an adapter of another model.
        """
        scale = lora.check_scale(scale)
        self.add_adapter(adapters.read(path, self.model), scale)

    def add_adapter(self, adapter: Adapter, scale: float = 1.0) -> None:
        """`load_lora_weights` of what was read."""
        if adapter.kroneckers:
            self._remember()
            self.params = adapters.add_full(self.params, adapter, self.model, scale, self.mesh)
        if adapter.factors:
            loaded = Loaded(adapters.place(adapter, self.model, self.mesh), scale * adapter.scale)
            self._apply([*self.adapters, loaded])

    def fuse_lora(self) -> None:
        """Merge the adapters into the parameters, W + B A: what is drawn is the same, and faster.

        The kernels as they were stay in memory for `unload_lora_weights`.
        """
        if self._lora is not None:
            self._remember()
            self.params = adapters.merge(self.params, self._lora, self.mesh)
            self._apply([])

    def unload_lora_weights(self) -> None:
        """Take all adapters away, merged ones too: the parameters are those they were, to the bit."""
        self._apply([])
        if self._unmerged is not None:
            self.params, self._unmerged = self._unmerged, None

    def _remember(self) -> None:
        self._unmerged = self.params if self._unmerged is None else self._unmerged

    def _apply(self, chosen: list[Loaded]) -> None:
        self._lora, self.adapters = adapters.joined(chosen, self.mesh), chosen

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        base_resolution: int | None = None,
        aspect_ratio: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        solver: Solver = "euler",
        num_images_per_prompt: int = 1,
        seed: int = 0,
        latents: np.ndarray | None = None,
        prompt_embeds: TextFeatures | None = None,
        negative_prompt_embeds: TextFeatures | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
        return_dict: bool = True,
        progress: Callable[[int, int], None] | None = None,
        reasoner: bool | None = None,
        **others,
    ) -> PipelineOutput | tuple[Any]:
        """Draw `num_images_per_prompt` images for each prompt.

        Args:
          prompt: one prompt or several; a blank one is the unconditional case.
          negative_prompt: what guidance moves away from, one for all prompts or one each; blank or None is no text at
            all, as in the release.
          height, width: pixels; multiples of the codec's tile. Both default to the pipeline's size.
          base_resolution, aspect_ratio: instead of a size, one the release offers: 1024 or 1440, and "W:H" out of
            1:2, 9:16, 2:3, 3:4, 1:1, 4:3, 3:2, 16:9, 2:1. Either defaults to 1024 or 1:1.
          num_inference_steps, guidance_scale: default to the pipeline's; at a guidance of 1 the unconditional branch is
            not run.
          solver: "euler" as in the release, or "dpm2", of second order at the same cost.
          seed: 0 to 2^64 - 1; image i starts from noise that depends on (seed, i) and the number of latent tokens only.
          latents: that noise, given instead: [len(prompts) * num_images_per_prompt, N, C].
          prompt_embeds, negative_prompt_embeds: text features in place of the prompts.
          output_type: "pil", "np" (float32 [0, 1]) or "latent" (normalised packed latents).
          return_dict: False returns a tuple of the images alone.
          progress: called with (images drawn, images in all) after each batch.
          reasoner: False draws the prompts as they are; by default the pipeline's reasoner, if there is one, rewrites
            them with `seed`. A prompt that it cannot rewrite is drawn as it is: `rewrites` of the output say why.
          others: arguments of diffusers' pipelines that are none here, which are refused by name unless they are None.

        Raises LensError for arguments that cannot be used, and for images that are not finite.
        """
        if others:
            arguments.refuse(others, [name for name in inspect.signature(self.__call__).parameters if name != "others"])
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        steps = arguments.whole("num_inference_steps", steps)
        guidance_scale = arguments.number("guidance_scale", guidance_scale)
        num_images_per_prompt = arguments.whole("num_images_per_prompt", num_images_per_prompt)
        batch_size = arguments.whole("batch_size", self.batch_size)
        arguments.choice("output_type", output_type, OUTPUT_TYPES)
        arguments.choice("solver", solver, SOLVERS)
        if progress is not None and not callable(progress):
            raise LensError(f"progress is {progress!r:.60}; it must be a function of (images drawn, images in all)")
        size = self._size(height, width, base_resolution, aspect_ratio)
        grid = latent_grid(self.codec, *size)
        memory.check(self.model, size, grid[0] * grid[1])
        self._warn_of_size(*size)

        # All that may be wrong is found before a reasoner is asked, which may cost money.
        if (prompt is None) == (prompt_embeds is None):
            raise LensError("give either prompt or prompt_embeds")
        prompts = None if prompt is None else _listed(prompt)
        each = len(prompt_embeds.lengths) if isinstance(prompt_embeds, TextFeatures) else len(prompts or ())
        if guidance_scale != 1 and negative_prompt_embeds is None:
            self._negatives(negative_prompt, each)
        count, shape = each * num_images_per_prompt, (grid[0] * grid[1], self.model.latent_channels)
        if latents is None:
            noise = draw.seed_noise(seed, count, *shape)
        else:
            noise = arguments.array("latents", latents, (count, *shape))
        rewrites = None
        if self._asks_reasoner(reasoner) and prompts is not None:
            rewrites = self.reasoner.rewrite(prompts, seed)
            prompts = [rewrite.text for rewrite in rewrites]

        text = self._features(prompts, prompt_embeds)
        negative = None
        if guidance_scale != 1:
            negative = self._negative_features(negative_prompt, negative_prompt_embeds, len(text.lengths))
        text, negative = _repeat(text, num_images_per_prompt), negative and _repeat(negative, num_images_per_prompt)

        chunks = []
        for rows in draw.chunks(count, batch_size, self.mesh):
            unwanted = negative and _rows(negative, rows)
            final = self.denoise(noise[rows], _rows(text, rows), unwanted, grid, steps, guidance_scale, solver)
            chunks.append(self.decode(final, grid, output_type))
            if progress:
                progress(min(count, int(rows[0]) + len(rows)), count)
        images = np.concatenate(chunks)[:count]
        images = [Image.fromarray(image) for image in images] if output_type == "pil" else images
        return PipelineOutput(images, text.date, prompts, rewrites) if return_dict else (images,)

    def _warn_of_size(self, height: int, width: int) -> None:
        """Of a size that is far from all that were trained on: such images are mostly empty or torn."""
        least, most = self.trained_areas or (height * width,) * 2
        if height * width > _FAR * most or _FAR * height * width < least:
            sizes = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            warnings.warn(
                f"{height}x{width} are {height * width:,} pixels, and this model was trained on {sizes}: it may draw "
                "little of use",
                LensWarning,
                stacklevel=3,
            )

    def _asks_reasoner(self, wanted: bool | None) -> bool:
        """Whether prompts are to be rewritten."""
        if not (wanted is None or isinstance(wanted, bool | np.bool_)):
            raise LensError(f"reasoner is {wanted!r:.60}; it must be True or False")
        if wanted and self.reasoner is None:
            raise LensError('this pipeline has no reasoner; load one (from_pretrained(..., reasoner="local"))')
        return self.reasoner is not None and (wanted is None or bool(wanted))

    def _size(self, height, width, base_resolution, aspect_ratio) -> tuple[int, int]:
        if (height is None) != (width is None):
            raise LensError("give both height and width, or neither")
        if base_resolution is None and aspect_ratio is None:
            if height is None:
                return self.default_size
            return arguments.whole("height", height), arguments.whole("width", width)
        if height is not None:
            raise LensError("give either height and width, or base_resolution and aspect_ratio")
        return offered_size(1024 if base_resolution is None else base_resolution, aspect_ratio or "1:1")

    def _features(self, prompts: Sequence[str] | None, embeds: TextFeatures | None) -> TextFeatures:
        if embeds is None:
            return self._encode(prompts)
        if not isinstance(embeds, TextFeatures):
            raise LensError(f"prompt_embeds is {type(embeds).__name__}; it must be a TextFeatures (layers, lengths)")
        shapes = [np.shape(layer) for layer in embeds.layers]
        batch = len(embeds.lengths)
        wanted = (self.model.text_layers, batch, self.model.text_width)
        if any((len(shapes), *shape[:1], *shape[2:]) != wanted or shape[1] < max(embeds.lengths) for shape in shapes):
            raise LensError(
                f"prompt_embeds are {[list(shape) for shape in shapes]}; this model needs {wanted[0]} layers of "
                f"[{batch}, T, {wanted[2]}] with T at least {max(embeds.lengths)}"
            )
        return embeds._replace(layers=tuple(embeds.layers), lengths=np.asarray(embeds.lengths, np.int32))

    def _encode(self, prompts: Sequence[str]) -> TextFeatures:
        if self.text_encoder is None:
            raise LensError("this pipeline has no text encoder; give prompt_embeds")
        return self.text_encoder.encode(prompts)

    def _negative_features(self, negative_prompt, embeds: TextFeatures | None, count: int) -> TextFeatures | None:
        """Features of the negative prompts, or None when all are blank: no text at all."""
        if embeds is not None:
            if negative_prompt is not None:
                raise LensError("give either negative_prompt or negative_prompt_embeds")
            features = self._features(None, embeds)
        else:
            negatives = self._negatives(negative_prompt, count)
            features = self._encode(negatives) if any(n.strip() for n in negatives) else None
        if features is not None and len(features.lengths) == 1:
            return _repeat(features, count)
        if features is not None and len(features.lengths) != count:
            raise LensError(f"{len(features.lengths)} negative prompts for {count} prompts; give one, or one each")
        return features

    def _negatives(self, negative_prompt, count: int) -> list[str]:
        """One for all prompts, or one each."""
        if negative_prompt is None or isinstance(negative_prompt, str):
            return [negative_prompt or ""]
        if not isinstance(negative_prompt, Sequence) or not all(isinstance(n, str) for n in negative_prompt):
            raise LensError("negative_prompt must be text or a list of texts")
        if len(negative_prompt) not in (1, count):
            raise LensError(f"{len(negative_prompt)} negative prompts for {count} prompts; give one, or one each")
        return list(negative_prompt)

    def denoise(
        self,
        noise: np.ndarray,
        text: TextFeatures,
        negative: TextFeatures | None,
        grid: tuple[int, int],
        num_inference_steps: int,
        guidance_scale: float,
        solver: Solver = "euler",
    ) -> jax.Array:
        """`diffusion.draw.draw` with this pipeline's denoiser; `negative` None is no text at all."""
        return draw.draw(
            self.model,
            self.params,
            noise,
            (tuple(text.layers), text.lengths),
            negative and (tuple(negative.layers), negative.lengths),
            grid,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            solver=solver,
            mesh=self.mesh,
            lora=self._lora,
        )

    def decode(self, latents: jax.Array, grid: tuple[int, int], output_type: str) -> np.ndarray:
        """Latents [B, N, C] to uint8 [B, H, W, 3] ("pil"), float32 in [0, 1] ("np"), or as they are ("latent").

        Raises LensError for what is not finite.
        """
        if output_type == "latent":
            images = np.asarray(parallel.local_copy(latents, self.mesh))
            finite = np.isfinite(images).all((1, 2))
        else:
            program = parallel.on(self.mesh, decode_program)
            images, finite = map(np.asarray, program(self.codec, output_type, grid, self.codec_params, latents))
        if not finite.all():
            raise LensError(
                f"{int((~finite).sum())} of {len(finite)} images are not finite (NaN or infinity): the weights are "
                f"damaged, or {self.model.dtype} is too small for their values (dtype=)"
            )
        return images


def offered_size(base_resolution: int, aspect_ratio: str) -> tuple[int, int]:
    """(height, width) of a ratio "W:H" in one of the two tables of the release (resolution.py)."""
    if not isinstance(base_resolution, int) or base_resolution not in OFFERED:
        accepted = ", ".join(map(str, OFFERED))
        raise LensError(f"base_resolution is {base_resolution!r:.60}; accepted: {accepted}")
    arguments.choice("aspect_ratio", aspect_ratio, RATIOS)
    bucket = OFFERED[base_resolution][RATIOS.index(aspect_ratio)]
    return bucket.height, bucket.width


def _listed(prompt: Any) -> list[str]:
    """One text or several as a list of texts."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or not len(prompts):
        raise LensError("prompt must be text or a non-empty list of texts")
    check_prompts(prompts)
    return list(prompts)


def _rows(features: TextFeatures, rows: np.ndarray) -> TextFeatures:
    return features._replace(layers=tuple(layer[rows] for layer in features.layers), lengths=features.lengths[rows])


def _repeat(features: TextFeatures, times: int) -> TextFeatures:
    return _rows(features, np.repeat(np.arange(len(features.lengths)), times))
