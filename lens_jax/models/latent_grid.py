"""How many latent tokens an image has."""

from typing import Any

from lens_jax.errors import LensError


def latent_grid(config: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of latent tokens of an image; LensError when its codec, which has a `tile`, cannot tile it."""
    if height < 1 or width < 1 or height % config.tile or width % config.tile:
        low = [max(config.tile, side - side % config.tile) for side in (height, width)]
        raise LensError(
            f"size {height}x{width} cannot be tiled: height and width must be positive multiples of {config.tile}, "
            f"e.g. {low[0]}x{low[1]}"
        )
    return height // config.tile, width // config.tile
