"""The sample sheet of a run: fixed prompts drawn from the moving average, where it lies."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lens_jax import parallel
from lens_jax.contact_sheet import contact_sheet
from lens_jax.data.buckets import Bucket
from lens_jax.diffusion import draw
from lens_jax.encoders.images import decode_program
from lens_jax.encoders.text import TextFeatures
from lens_jax.errors import LensError, LensWarning
from lens_jax.models.latent_grid import latent_grid
from lens_jax.pretraining.config import TrainConfig

# Images drawn at a time, or as many more as the mesh needs.
_BATCH = 16


def draw_sheet(
    config: TrainConfig,
    params: dict,
    lora: dict | None,
    codec_params: dict,
    prompts: TextFeatures,
    sizes: Sequence[Bucket],
    mesh=None,
) -> Image.Image:
    """A row for each of `config.samples.prompts` and a column a size; all processes of a mesh must call it.

    params: the moving average as it is laid out on the mesh, in the memory of the devices: each block is gathered when
    it is used, and no device ever holds all of it. lora: an adapter for them, laid out alike.
    """
    columns = [draw_column(config, params, lora, codec_params, prompts, size, mesh) for size in sizes]
    return contact_sheet(list(zip(*columns)), config.samples.prompts)


def draw_column(
    config: TrainConfig, params, lora, codec_params, prompts: TextFeatures, size: Bucket, mesh
) -> np.ndarray:
    """uint8 [prompts, H, W, 3] of one size, of a config's `samples`; the rest as in `draw_sheet`."""
    samples, count = config.samples, len(prompts.lengths)
    grid = latent_grid(config.codec, size.height, size.width)
    noise = draw.seed_noise(samples.seed, count, grid[0] * grid[1], config.model.latent_channels)
    images, finite = [], []
    for rows in draw.chunks(count, _BATCH, mesh):
        latents = draw.draw(
            config.model,
            params,
            noise[rows],
            (tuple(layer[rows] for layer in prompts.layers), prompts.lengths[rows]),
            None,
            grid,
            num_inference_steps=samples.num_inference_steps,
            guidance_scale=samples.guidance_scale,
            mesh=mesh,
            lora=lora,
        )
        decoded = parallel.on(mesh, decode_program)(config.codec, "pil", grid, codec_params, latents)
        for kept, part in zip((images, finite), decoded):
            kept.append(np.asarray(part))
    broken = count - int(np.concatenate(finite)[:count].sum())
    if broken:
        message = f"{broken} of {count} samples of {size.height}x{size.width} are not finite; they are drawn magenta"
        warnings.warn(message, LensWarning, stacklevel=2)
    return np.concatenate(images)[:count]


def save_sheet(sheet: Image.Image, folder: Path, step: int) -> Path:
    """Write the sheet of a step into a folder, and say where."""
    path = folder / f"step_{step:07d}.png"
    try:
        folder.mkdir(exist_ok=True)
        sheet.save(path)
    except OSError as error:
        raise LensError(f"{path}: cannot be written: {error.strerror}") from None
    return path
