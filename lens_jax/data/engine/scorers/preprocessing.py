"""How an image becomes the input of a network, as the preprocessor_config.json of its release says.

By Pillow, as the processors of transformers do without torchvision, whose own resize differs by a level here and there.
What is resized stays uint8 until it is on the device: a quarter of the bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lens_jax.convert.folder import check_size, read_json
from lens_jax.errors import LensError

FILE = "preprocessor_config.json"
# What transformers does where the file leaves a key out; sizes are then 224.
_MISSING = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 3}
# By Pillow's numbers: bilinear of SigLIP 2, bicubic of the others.
_FILTERS = {2: Image.Resampling.BILINEAR, 3: Image.Resampling.BICUBIC}
_LARGEST = 1 << 13
# Up to so many times as long as wide an image is resized whole and its middle cut, as transformers does. Of one that is
# longer the middle alone is, by a border that Pillow keeps in float32: some pixels are a level or two beside those. The
# whole of a strip of a million pixels would take 150 GB.
_WHOLE = 64


@dataclass(frozen=True)
class Preprocessing:
    """From an image of any size to a square."""

    # Of the square.
    side: int
    # `crop`: the shorter side becomes `side` and the middle is kept (CLIP); `squash`: both sides do (SigLIP).
    fit: Literal["crop", "squash"]
    resample: Image.Resampling
    # Of values in [0, 1], by channel.
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def resize(self, image: np.ndarray) -> np.ndarray:
        """uint8 [side, side, 3] of uint8 [H, W, 3]."""
        whole, size = Image.fromarray(image), (self.side, self.side)
        if self.fit == "squash":
            return np.asarray(whole.resize(size, self.resample))
        short = min(whole.size)
        resized = [self.side if side == short else int(self.side * side / short) for side in whole.size]
        starts = [(side - self.side) // 2 for side in resized]
        if max(resized) <= _WHOLE * self.side:
            middle = whole.resize(resized, self.resample)
            return np.asarray(middle.crop((*starts, *(start + self.side for start in starts))))
        ends = [start + self.side for start in starts]
        before = lambda places: [min(x * a / b, a) for x, a, b in zip(places, whole.size, resized)]
        return np.asarray(whole.resize(size, self.resample, (*before(starts), *before(ends))))

    def normalise(self, pixels: jax.Array) -> jax.Array:
        """float32 [..., 3] of what `resize` gave, for use inside a program."""
        scaled = pixels.astype(jnp.float32) * np.float32(1 / 255)
        return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def read_preprocessing(folder: Path, fit: Literal["crop", "squash"], side: int) -> Preprocessing:
    """What the preprocessor_config.json of a folder says; LensError unless it makes `fit` images of that side."""
    path = folder / FILE
    if not path.is_file():
        raise LensError(f"{folder}: no {FILE}, which says how images are resized; it is a file of the release")
    values = read_json(path)
    found = _MISSING | {key: values[key] for key in _MISSING if key in values}
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if found[key] is not True:
            raise LensError(f"{path}: {key} is {found[key]!r:.80}; accepted: true")
    crops = values.get("do_center_crop", fit == "crop")
    if crops is not True if fit == "crop" else crops not in (False, None):
        raise LensError(f"{path}: do_center_crop is {crops!r:.80}; accepted: {'true' if fit == 'crop' else 'false'}")
    factor = found["rescale_factor"]
    if type(factor) is not float or abs(factor * 255 - 1) > 1e-6:
        raise LensError(f"{path}: rescale_factor is {factor!r:.80}; accepted: 1/255")
    if type(found["resample"]) is not int or found["resample"] not in _FILTERS:
        raise LensError(f"{path}: resample is {found['resample']!r:.80}; accepted: 2 (bilinear), 3 (bicubic)")
    for key in ("size", "crop_size") if fit == "crop" else ("size",):
        value = values.get(key, 224)
        if _side(value, key, path) != side:
            raise LensError(f"{path}: {key} is {value!r:.80}; the network takes {side} x {side}")
    mean, std = (_channels(values, key, path) for key in ("image_mean", "image_std"))
    if min(std) <= 0:
        raise LensError(f"{path}: image_std is {list(std)}; accepted: three numbers above 0")
    return Preprocessing(side, fit, _FILTERS[found["resample"]], mean, std)


def _side(value: Any, key: str, path: Path) -> int:
    """The one number of a size: N, {"shortest_edge": N}, or {"height": N, "width": N}."""
    if isinstance(value, Mapping):
        sizes = list({name: value[name] for name in ("shortest_edge", "height", "width") if name in value}.values())
        value = sizes[0] if sizes and all(size == sizes[0] for size in sizes) else value
    return check_size(value, key, str(path), _LARGEST)


def _channels(values: Mapping[str, Any], key: str, path: Path) -> tuple[float, float, float]:
    found = values.get(key)
    if (
        not isinstance(found, list)
        or len(found) != 3
        or not all(type(x) in (int, float) and abs(x) < 10 for x in found)
    ):
        raise LensError(f"{path}: {key} is {found!r:.80}; accepted: three numbers")
    return tuple(map(float, found))
