"""The image that a vision model is sent."""

import hashlib

import numpy as np

from lens_jax.data.engine.captions.config import Caption
from lens_jax.data.engine.decode import Limits, decode
from lens_jax.data.engine.extra import needed
from lens_jax.llm.request import Image

# Longest side. Models with tiles fit an image into a square of this first, and then to a short side of 768.
LONG_SIDE = 2048


def size(caption: Caption, height: int, width: int) -> tuple[int, int]:
    """(height, width) of what is sent of an image. Nothing is enlarged."""
    scale = min(1.0, caption.short_side / min(height, width), LONG_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def fingerprint(caption: Caption, sha256: bytes) -> str:
    """Names what is sent of the file with this hash, whichever encoder made it: so that an answer is found again after
    an update, and without decoding the image."""
    return hashlib.sha256(sha256 + f"{caption.short_side} {LONG_SIDE} {caption.quality}".encode()).hexdigest()


def named(caption: Caption, sha256: bytes) -> Image:
    """The image by name alone, for questions whose answers are known."""
    return Image(b"", "image/jpeg", fingerprint(caption, sha256))


def prepare(caption: Caption, data: bytes, sha256: bytes, limits: Limits) -> Image:
    """A JPEG of the file's pixels, without anything else that the file says (place, camera, owner). Undecodable where
    it is damaged."""
    pixels = decode(data, limits)
    height, width = size(caption, *pixels.shape[:2])
    if (height, width) != pixels.shape[:2]:
        cv2 = needed("cv2")
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    encoded = needed("simplejpeg").encode_jpeg(
        np.ascontiguousarray(pixels), quality=caption.quality, colorspace="RGB", colorsubsampling="420"
    )
    image = Image(encoded, "image/jpeg", fingerprint(caption, sha256))
    _ = image.url  # in the thread that prepares, not in the one that asks
    return image
