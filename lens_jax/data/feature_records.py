"""One example after the networks that training does not change: latents and text features.

    4 bytes     length of the header, little-endian
    header      msgpack map {"v": 2, "tokens": int, "channels": int, "dtype": "bfloat16" or "float32",
                "captions": {language: [tokens, ...]}, "layers": int, "text_width": int,
                "height": int, "width": int, "source": str, "licence": str}
    zeros       up to a multiple of 64 bytes
    arrays      latents [tokens, channels], then each caption [layers, tokens, text_width]

A record may hold the features of many captions, of which an epoch takes one: where an array starts follows from the
header, so decoding copies none of them. In bfloat16 a text token of GPT-OSS takes 4 x 2,880 x 2 = 23,040 bytes and the
latents of 1024 x 1024 pixels 1.05 MB. Never float16: features reach 10,000, and sums of them in attention leave its
range.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import msgpack
import numpy as np

from lens_jax.data.records import MAX_CAPTIONS, MAX_LANGUAGES, MAX_SIDE, MAX_TEXT, unpack
from lens_jax.errors import LensError

VERSION = 2
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
# 64 captions of 512 tokens in float32 stay below.
MAX_RECORD_BYTES = 2 << 30
MAX_HEADER_BYTES = 1 << 20
MAX_SIZES = 1 << 20
_ALIGNED = 64


@dataclass(frozen=True)
class FeatureRecord:
    """Latents of one image and the features of its captions."""

    # [N, C].
    latents: np.ndarray
    # By language, for each caption [layers, tokens, width]; a caption of no tokens is no text at all.
    captions: Mapping[str, tuple[np.ndarray, ...]]
    # Size of the image in pixels.
    height: int
    width: int
    # Where the image came from, and its licence.
    source: str = ""
    licence: str = ""

    @property
    def longest(self) -> int:
        """Tokens of the longest caption."""
        return max(caption.shape[1] for texts in self.captions.values() for caption in texts)


def encode(record: FeatureRecord) -> bytes:
    """Bytes of one entry; all arrays in the dtype of the latents. LensError when `decode` would refuse them."""
    captions = [caption for texts in record.captions.values() for caption in texts]
    fields = {
        "v": VERSION,
        "tokens": record.latents.shape[0],
        "channels": record.latents.shape[1],
        "dtype": str(record.latents.dtype),
        "captions": {name: [caption.shape[1] for caption in texts] for name, texts in record.captions.items()},
        "layers": captions[0].shape[0],
        "text_width": captions[0].shape[2],
        "height": record.height,
        "width": record.width,
        "source": record.source,
        "licence": record.licence,
    }
    header = msgpack.packb(fields, use_bin_type=True)
    start = len(header).to_bytes(4, "little") + header
    arrays = [x.astype(record.latents.dtype, copy=False).tobytes() for x in (record.latents, *captions)]
    entry = b"".join((start, bytes(-len(start) % _ALIGNED), *arrays))
    if len(entry) > MAX_RECORD_BYTES:
        problem = f"{len(captions)} captions take {len(entry)} bytes of features; at most {MAX_RECORD_BYTES}"
        raise LensError(f"{record.source}: its {problem} are accepted: give it fewer")
    return entry


def decode(data: bytes, where: str) -> FeatureRecord:
    """The record in `data`, its arrays views of it. LensError names `where` for anything that is not one."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise LensError(f"{where}: {message}")

    need(len(data) <= MAX_RECORD_BYTES, f"record of {len(data)} bytes; at most {MAX_RECORD_BYTES} are accepted")
    size = int.from_bytes(data[:4], "little")
    need(len(data) >= 4 + size, "cut inside its header")
    fields = unpack(data[4 : 4 + size], where, MAX_HEADER_BYTES)
    need(fields.get("v") == VERSION, f"no feature record of version {VERSION}")
    sizes = [fields.get(name) for name in ("tokens", "channels", "layers", "text_width", "height", "width")]
    need(all(type(size) is int and 0 < size <= MAX_SIZES for size in sizes), "its sizes must be positive integers")
    tokens, channels, layers, text_width, height, width = sizes
    need(max(height, width) <= MAX_SIDE, f"sides must be at most {MAX_SIDE}")
    dtype = DTYPES.get(fields.get("dtype")) if isinstance(fields.get("dtype"), str) else None
    need(dtype is not None, f"dtype {fields.get('dtype')!r:.40}; accepted: {', '.join(DTYPES)}")
    source, licence = fields.get("source"), fields.get("licence")
    need(all(isinstance(x, str) and len(x) <= MAX_TEXT for x in (source, licence)), "source and licence must be texts")
    captions = fields.get("captions")
    need(isinstance(captions, dict) and 0 < len(captions) <= MAX_LANGUAGES, "'captions' must map languages to lists")
    for language, counts in captions.items():
        name = f"captions[{language!r:.40}]"
        need(isinstance(counts, list) and 0 < len(counts) <= MAX_CAPTIONS, f"{name} must list its lengths")
        need(all(type(n) is int and 0 <= n <= MAX_TEXT for n in counts), f"{name} must hold numbers of tokens")

    start = 4 + size + -(4 + size) % _ALIGNED
    numbers = tokens * channels + layers * text_width * sum(n for counts in captions.values() for n in counts)
    expected = start + numbers * dtype.itemsize
    need(len(data) == expected, f"{len(data)} bytes, its header says {expected}")

    def array(*shape: int) -> np.ndarray:
        nonlocal start
        count = int(np.prod(shape, dtype=np.int64))
        view = np.frombuffer(data, dtype, count, start).reshape(shape)
        start += count * dtype.itemsize
        return view

    latents = array(tokens, channels)
    texts = {name: tuple(array(layers, n, text_width) for n in counts) for name, counts in captions.items()}
    return FeatureRecord(latents, texts, height, width, source, licence)
