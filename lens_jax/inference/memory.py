"""Whether one image of a size can fit a device at all, said before anything is computed."""

import os

import jax

from lens_jax.errors import LensError
from lens_jax.models.denoiser import DenoiserConfig


def check(model: DenoiserConfig, size: tuple[int, int], tokens: int) -> None:
    """LensError where drawing one image of `size` (height, width) needs more memory than a device has in all."""
    needed, there = least_bytes(model, size, tokens), device_bytes()
    if there is not None and needed > there:
        raise LensError(
            f"an image of {size[0]}x{size[1]} pixels has {tokens:,} tokens and needs at least {needed / 1e9:,.0f} GB "
            f"of memory beside the weights; a device here has {there / 1e9:,.0f} GB in all; ask for fewer pixels"
        )


def least_bytes(model: DenoiserConfig, size: tuple[int, int], tokens: int) -> int:
    """What is in memory at once without doubt: in a block the residual, queries, keys, values and the attention's
    output, or the residual and both halves of the SwiGLU; latents and noise in float32; and the image."""
    itemsize = jax.numpy.dtype(model.dtype).itemsize
    block = itemsize * max(5 * model.width, model.width + 2 * model.hidden)
    return tokens * (block + 2 * 4 * model.latent_channels) + size[0] * size[1] * 3 * 4


def device_bytes() -> int | None:
    """Memory of the first device: an accelerator's own, else the machine's; None where nobody says."""
    if jax.default_backend() == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
