"""A descriptor of where light and colour are in an image: no network, and no weights.

It finds copies of an image (compressed, resized, a little cropped, with a logo) where the report's CLIP is not at
hand. Two photographs of one thing are strangers to it, while two things of one outline and colour, alone on white, may
be taken for copies. The threshold of 0.985 is CLIP's; that of this descriptor is 0.9, of copies that were made
(`lens-jax bench copies`, docs/data_engine_dedup.md).

The image is shrunk to 32 x 32 in luma and two chromas. Its cosine transform's low frequencies, the mean of the luma
left out, are multiplied by their frequency, since in natural images they fall off with it; the descriptor is their
direction. So neither brightness nor contrast count. An image without any variation has none.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

NAME = "layout"
# Raised when the descriptor changes: vectors of two versions must not be compared.
_VERSION = 2
_SIDE = 32
# Frequencies u, v with u + v up to so many are kept, of luma and of each chroma.
_LUMA, _CHROMA = 7, 4
# Of what differs less than the rounding of 8-bit pixels no direction is taken.
_LEAST = 2e-3


@dataclass(frozen=True)
class Layout:
    """The descriptor, behind the protocol of scorers."""

    name = "colour layout, a descriptor without a network"
    columns = ("embedding",)
    size = (_SIDE, _SIDE)
    batch = 256

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return sum(len(kept) for kept, _ in _PLANES)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """float32 [32, 32, 3], each pixel the mean of what it covers: luma and chroma (JPEG's YCbCr), grey at 0."""
        small = Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BOX)
        return (np.asarray(small.convert("YCbCr"), np.float32) - 128) / 255

    def score(self, batch: np.ndarray) -> Mapping[str, np.ndarray]:
        """embedding [B, width]: of unit length, or 0 where the image has no variation."""
        frequencies = (_DCT @ batch.transpose(0, 3, 1, 2) @ _DCT.T).reshape(len(batch), 3, -1)
        parts = [frequencies[:, plane, kept] * weight for plane, (kept, weight) in enumerate(_PLANES)]
        vectors = np.concatenate(parts, 1)
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        return {"embedding": np.where(length > _LEAST, vectors / np.maximum(length, _LEAST), 0).astype(np.float32)}


def load() -> Layout:
    """The descriptor."""
    return Layout()


def fingerprint() -> str:
    """What vectors depend on, in place of the hash of weights."""
    return hashlib.sha256(repr((NAME, _VERSION, _SIDE, _LUMA, _CHROMA)).encode()).hexdigest()


def _transform() -> np.ndarray:
    """Of the orthonormal cosine transform the lowest frequencies, float32 [8, 32], scaled so that a mean stays one."""
    place = np.arange(_SIDE)
    rows = np.cos(np.pi * place[: _LUMA + 1, None] * (2 * place + 1) / (2 * _SIDE)) * np.sqrt(2 / _SIDE)
    rows[0] /= np.sqrt(2)
    return (rows / np.sqrt(_SIDE)).astype(np.float32)


def _plane(highest: int, constant: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which of the flattened frequencies are kept, and their weights."""
    u, v = np.divmod(np.arange((_LUMA + 1) ** 2), _LUMA + 1)
    kept = np.flatnonzero((u + v <= highest) & (constant | (u + v > 0)))
    return kept, np.maximum(np.hypot(u, v)[kept], 1).astype(np.float32)


_DCT = _transform()
_PLANES = (_plane(_LUMA, False), _plane(_CHROMA, True), _plane(_CHROMA, True))
