"""What timm does with an image before a network sees it: its transform for evaluation, of a `pretrained_cfg`.

An image stays uint8 until it is on the device: a quarter of the bytes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lens_jax.errors import LensError

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_MODES = ("squash", "center")


@dataclass(frozen=True)
class TimmTransform:
    """Resized by Pillow, cropped to its middle, normalised.

    The defaults are of timm's eva02_base_patch14_448.mim_in22k_ft_in22k_in1k, which the unsafe-image classifier was
    trained from and whose transform its authors' package takes (nsfw-image-detector 0.1.2).
    """

    # Side of the result in pixels.
    size: int = 448
    # "squash" resizes both sides to size / crop_pct; "center" the shorter one, and keeps the ratio of the sides.
    crop_mode: str = "squash"
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    # Of channels within 0 to 1; CLIP's.
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def resize(self, image: np.ndarray) -> np.ndarray:
        """uint8 [size, size, 3] of a uint8 [H, W, 3] image in sRGB."""
        picture = Image.fromarray(image)
        side = math.floor(self.size / self.crop_pct)
        width, height = side, side
        if self.crop_mode == "center":
            # The longer side is rounded down, as torchvision does.
            shorter = min(picture.size)
            width, height = (int(side * of / shorter) if of > shorter else side for of in picture.size)
        picture = picture.resize((width, height), _FILTERS[self.interpolation])
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return np.asarray(picture.crop((left, top, left + self.size, top + self.size)))

    def normalise(self, pixels: jax.Array) -> jax.Array:
        """float32 [..., 3] of what `resize` gave, for use inside a program."""
        # In torchvision's order. Compiled, a division by a constant becomes a product: up to 5e-7 from torchvision's.
        scaled = pixels.astype(jnp.float32) / np.float32(255)
        return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def read_transform(values: Mapping, size: int, where: str) -> TimmTransform:
    """The transform of a `pretrained_cfg`, where keys that are not there have their defaults; LensError for a value
    that is none of timm's."""
    default = TimmTransform(size)
    mode = values.get("crop_mode", default.crop_mode)
    interpolation = values.get("interpolation", default.interpolation)
    for key, value, accepted in (("crop_mode", mode, _MODES), ("interpolation", interpolation, tuple(_FILTERS))):
        if value not in accepted:
            raise LensError(f"{where}: pretrained_cfg.{key} is {value!r:.80}; accepted: {', '.join(accepted)}")
    share = values.get("crop_pct", default.crop_pct)
    # Below a half the image before the crop would be over twice as large as anything that timm has.
    if type(share) not in (int, float) or not 0.5 <= share <= 1:
        raise LensError(f"{where}: pretrained_cfg.crop_pct is {share!r:.80}; accepted: a number within 0.5 to 1")
    return TimmTransform(
        size, mode, share, interpolation, _channels(values, "mean", 0, where), _channels(values, "std", 1e-3, where)
    )


def _channels(values: Mapping, key: str, least: float, where: str) -> tuple[float, ...]:
    given = values.get(key, list(getattr(TimmTransform, key)))
    if (
        not isinstance(given, list)
        or len(given) != 3
        or not all(type(value) in (int, float) and least <= value <= 1 for value in given)
    ):
        raise LensError(f"{where}: pretrained_cfg.{key} is {given!r:.80}; accepted: three numbers within {least} to 1")
    return tuple(map(float, given))
