"""Buckets: the sizes that images are cropped to, so that a batch has one shape.

The report trains on 27 of them, three areas in nine ratios, each side a multiple of 16 pixels (one token). Ratios are
written W:H as in the report ("1:2" is tall), sizes HxW as arrays have them.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lens_jax.errors import LensError, nearest

RATIOS = ("1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1")


@dataclass(frozen=True, order=True)
class Bucket:
    """One size in pixels."""

    height: int
    width: int

    def tokens(self, tile: int = 16) -> int:
        """Image tokens: the number of tile x tile patches. Lens has 16-pixel tiles (8 of the VAE, 2 of the packing)."""
        if self.height % tile or self.width % tile:
            raise LensError(f"bucket {self}: its sides are not multiples of the tile, {tile}")
        return (self.height // tile) * (self.width // tile)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


# Classes of caption lengths, in tokens with the 22 behind every caption, that leave little empty at every area of the
# report: with its captions 5 to 9 % of all tokens are padding, where image and text together are multiples of 128.
CAPTION_CLASSES = (128, 160, 216, 256, 288, 344)


def _mirrored(*tall: tuple[int, int]) -> tuple[Bucket, ...]:
    upright = tuple(Bucket(height, width) for height, width in tall)
    return upright + tuple(Bucket(b.width, b.height) for b in reversed(upright[:-1]))


# In the order of RATIOS. These are literal because no single rounding rule gives them all; the 1440 table comes from
# the released inference code, the others from the report.
LENS_512 = _mirrored((704, 352), (672, 384), (640, 416), (608, 448), (512, 512))
LENS_768 = _mirrored((1088, 544), (1024, 576), (960, 640), (896, 672), (768, 768))
LENS_1024 = _mirrored((1472, 736), (1376, 768), (1248, 832), (1152, 864), (1024, 1024))
LENS_1440 = _mirrored((2080, 1040), (1936, 1088), (1760, 1168), (1616, 1216), (1440, 1440))
LENS_PRETRAINING = LENS_512 + LENS_768 + LENS_1024

TABLES = {
    "lens-512": LENS_512,
    "lens-768": LENS_768,
    "lens-1024": LENS_1024,
    "lens-1440": LENS_1440,
    "lens-pretraining": LENS_PRETRAINING,
}


# Buckets whose token counts are this close belong to one area: those of the report differ by up to 1.10 within an area,
# and by at least 1.63 between areas.
SAME_AREA = 1.25


def areas(buckets: Sequence[Bucket], tile: int = 16) -> tuple[int, ...]:
    """The area each bucket belongs to, numbered from the smallest."""
    numbers, first = {}, 0
    for tokens in sorted({bucket.tokens(tile) for bucket in buckets}):
        if not numbers or tokens > SAME_AREA * first:
            first = tokens
            numbers[tokens] = len(set(numbers.values()))
        else:
            numbers[tokens] = max(numbers.values())
    return tuple(numbers[bucket.tokens(tile)] for bucket in buckets)


def parse_ratio(text: str) -> float:
    """Width over height of "W:H"."""
    match = re.fullmatch(r"([1-9]\d{0,4}):([1-9]\d{0,4})", text)
    if not match:
        raise LensError(f"ratio {text!r} is not of the form W:H, such as 3:4")
    return int(match[1]) / int(match[2])


def parse_bucket(text: str) -> Bucket:
    """The bucket written "HxW"."""
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not match:
        raise LensError(f"bucket {text!r} is not of the form HxW, such as 512x768")
    return Bucket(int(match[1]), int(match[2]))


def parse_buckets(texts: Sequence[str]) -> tuple[Bucket, ...]:
    """Buckets written "HxW", or names of TABLES, or a mixture; repeated ones are given once."""
    found: dict[Bucket, None] = {}
    for text in texts:
        if text not in TABLES and "x" not in text:
            known = ", ".join(TABLES)
            raise LensError(f"bucket {text!r} is neither HxW nor one of {known}{nearest(text, TABLES)}")
        found.update(dict.fromkeys(TABLES[text] if text in TABLES else (parse_bucket(text),)))
    return tuple(found)


def make_buckets(area_side: int, ratios: Sequence[str], tile: int) -> tuple[Bucket, ...]:
    """One bucket a ratio: sides multiples of `tile`, area and ratio together closest to area_side² and the ratio."""
    if tile < 1 or area_side < tile:
        raise LensError(f"size {area_side} with tile {tile}: the tile must be at least 1 and at most the size")
    found: dict[Bucket, str] = {}
    alike: list[tuple[Bucket, str]] = []
    for text in ratios:
        ratio = parse_ratio(text)
        columns = area_side * math.sqrt(ratio) / tile
        rows = area_side / math.sqrt(ratio) / tile

        def misfit(bucket: Bucket, ratio: float = ratio) -> tuple[float, float]:
            area = abs(math.log(bucket.height * bucket.width / area_side**2))
            shape = abs(math.log(bucket.width / bucket.height / ratio))
            # Ties are common, and go to the better shape; rounded, so that a ratio and its mirror break them alike.
            return round(area + shape, 9), round(shape, 9)

        candidates = [
            Bucket(row * tile, column * tile)
            for row in {max(1, math.floor(rows)), math.ceil(rows)}
            for column in {max(1, math.floor(columns)), math.ceil(columns)}
        ]
        bucket = min(candidates, key=misfit)
        if bucket in found:
            alike.append((bucket, text))
        found.setdefault(bucket, text)
    if alike:
        bucket, text = alike[0]
        raise LensError(
            f"ratios {found[bucket]} and {text} both give {bucket} at size {area_side} and tile {tile}; "
            f"leave some out: --ratios {' '.join(found.values())}, or take a smaller --tile"
        )
    if not found:
        raise LensError("ratios: at least one is needed, such as 1:1")
    return tuple(found)


# Buckets whose log ratios are this close count as the same shape at another area: within the report's table the same
# ratio at three areas differs by up to 0.025, and neighbouring ratios by at least 0.117.
SAME_SHAPE = 0.05


def assign(height: int, width: int, buckets: Sequence[Bucket], max_upscale: float = math.inf) -> Bucket | None:
    """The bucket for a height x width image: nearest log aspect ratio, then the largest area.

    Buckets that would need the image enlarged more than `max_upscale` times are not considered; None when none is
    left. The report states no rule; never enlarging (1.0) keeps interpolation blur out of the training set.
    """

    def misshape(bucket: Bucket) -> float:
        return abs(math.log(width / height) - math.log(bucket.width / bucket.height))

    open_to = [b for b in buckets if max(b.height / height, b.width / width) <= max_upscale]
    if not open_to:
        return None
    limit = min(map(misshape, open_to)) + SAME_SHAPE
    return max((b for b in open_to if misshape(b) <= limit), key=lambda b: (b.height * b.width, -misshape(b)))


def fit_image(image, bucket: Bucket) -> np.ndarray:
    """Resize a PIL image to cover the bucket and crop its centre: uint8 [bucket.height, bucket.width, 3].

    Lanczos when shrinking (PIL widens the kernel, so it is antialiased), bicubic when enlarging (Lanczos rings there).
    """
    from PIL import Image

    width, height = image.size
    if (height, width) == (bucket.height, bucket.width):
        return np.asarray(image)
    scale = max(bucket.height / height, bucket.width / width)
    crop_height, crop_width = min(height, bucket.height / scale), min(width, bucket.width / scale)
    top, left = (height - crop_height) / 2, (width - crop_width) / 2
    kernel = Image.Resampling.LANCZOS if scale <= 1 else Image.Resampling.BICUBIC
    box = (left, top, left + crop_width, top + crop_height)
    return np.asarray(image.resize((bucket.width, bucket.height), kernel, box=box))
