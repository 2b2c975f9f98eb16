"""One example after the networks that training does not change: latents and text features, as a msgpack map.

    {"v": 1, "latents": bytes, "tokens": int, "channels": int, "dtype": "bfloat16" or "float32",
     "captions": {language: [[tokens, bytes], ...]}, "layers": int, "text_width": int,
     "height": int, "width": int, "source": str, "licence": str}

In bfloat16 a text token of GPT-OSS takes 4 x 2,880 x 2 = 23,040 bytes and the latents of 1024 x 1024 pixels 1.05 MB.
Never float16: features reach 10,000, and their sums in attention leave its range.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import msgpack
import numpy as np

from lens_jax.data.records import MAX_CAPTIONS, MAX_LANGUAGES, MAX_SIDE, MAX_TEXT, unpack
from lens_jax.errors import LensError

VERSION = 1
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
# 64 captions of 512 tokens in float32 stay below.
MAX_RECORD_BYTES = 2 << 30
MAX_SIZES = 1 << 20


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


def encode(record: FeatureRecord) -> bytes:
    """Bytes of one entry; all arrays in the dtype of the latents."""
    dtype = str(record.latents.dtype)
    first = next(iter(record.captions.values()))[0]
    pack = lambda x: np.ascontiguousarray(x.astype(record.latents.dtype, copy=False)).tobytes()
    fields = {
        "v": VERSION,
        "latents": pack(record.latents),
        "tokens": record.latents.shape[0],
        "channels": record.latents.shape[1],
        "dtype": dtype,
        "captions": {name: [[x.shape[1], pack(x)] for x in texts] for name, texts in record.captions.items()},
        "layers": first.shape[0],
        "text_width": first.shape[2],
        "height": record.height,
        "width": record.width,
        "source": record.source,
        "licence": record.licence,
    }
    return msgpack.packb(fields, use_bin_type=True)


def decode(data: bytes, where: str) -> FeatureRecord:
    """The record in `data`, its arrays views of it. LensError names `where` for anything that is not one."""
    fields = unpack(data, where, MAX_RECORD_BYTES)

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise LensError(f"{where}: {message}")

    need(fields.get("v") == VERSION, f"no feature record of version {VERSION}")
    sizes = [fields.get(name) for name in ("tokens", "channels", "layers", "text_width", "height", "width")]
    need(all(type(size) is int and 0 < size <= MAX_SIZES for size in sizes), "its sizes must be positive integers")
    tokens, channels, layers, text_width, height, width = sizes
    need(max(height, width) <= MAX_SIDE, f"sides must be at most {MAX_SIDE}")
    dtype = DTYPES.get(fields.get("dtype")) if isinstance(fields.get("dtype"), str) else None
    need(dtype is not None, f"dtype {fields.get('dtype')!r:.40}; accepted: {', '.join(DTYPES)}")
    source, licence = fields.get("source"), fields.get("licence")
    need(all(isinstance(x, str) and len(x) <= MAX_TEXT for x in (source, licence)), "source and licence must be texts")

    def array(name: str, raw, *shape: int) -> np.ndarray:
        count = 1
        for size in shape:
            count *= size
        fits = isinstance(raw, bytes) and len(raw) == count * dtype.itemsize
        need(fits, f"{name} must be {list(shape)} numbers of {fields['dtype']}")
        return np.frombuffer(raw, dtype).reshape(shape)

    captions = fields.get("captions")
    need(isinstance(captions, dict) and 0 < len(captions) <= MAX_LANGUAGES, "'captions' must map languages to lists")
    texts = {}
    for language, entries in captions.items():
        name = f"captions[{language!r:.40}]"
        need(isinstance(entries, list) and 0 < len(entries) <= MAX_CAPTIONS, f"{name} must list its features")
        pairs = all(
            isinstance(e, list) and len(e) == 2 and type(e[0]) is int and 0 <= e[0] <= MAX_TEXT for e in entries
        )
        need(pairs, f"{name} must hold pairs of a number of tokens and bytes")
        texts[language] = tuple(array(name, raw, layers, count, text_width) for count, raw in entries)
    latents = array("latents", fields.get("latents"), tokens, channels)
    return FeatureRecord(latents, texts, height, width, source, licence)
