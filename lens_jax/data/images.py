"""Encoded image <-> uint8 [H, W, 3]. The bytes may come from anywhere, so they are treated as hostile."""

import io
import struct
from collections.abc import Iterator

import numpy as np

from lens_jax.data import colour
from lens_jax.data.file_kind import ACCEPTED, what_is
from lens_jax.errors import LensError

# PIL offers some forty formats, several with parsers nobody fuzzes; these three are what records may hold.
FORMATS = tuple(name.upper() for name in ACCEPTED)
# 80 megapixels lie below PIL's own warning (89) and cost 240 MB decoded; larger images are bombs or mistakes.
MAX_PIXELS = 80_000_000
MAX_ENCODED_BYTES = 64 << 20
# The longest side that each encoding can hold.
ENCODINGS = {"png": 65_535, "jpeg": 65_500, "webp": 16_383}


def decode_image(data: bytes, where: str) -> np.ndarray:
    """uint8 [H, W, 3] of PNG, JPEG or WebP bytes, see `open_image`."""
    return np.asarray(open_image(data, where))


def open_image(data: bytes, where: str):
    """The image, one of PIL's in mode RGB, in PNG, JPEG or WebP bytes.

    Turned as EXIF says, in sRGB by its colour profile, transparency on white, 16 bits in 8. To resize it at once:
    arrays in between cost a sixth of decoding. LensError names `where` and the reason for anything that is not
    such an image, or that can be taken in several ways: animations, colours that are not said by a profile.
    """
    from PIL import Image, ImageOps

    if len(data) > MAX_ENCODED_BYTES:
        raise LensError(f"{where}: image of {len(data)} bytes; at most {MAX_ENCODED_BYTES} are accepted")
    kind = what_is(data)
    if kind not in ACCEPTED:
        raise LensError(f"{where}: the file is {kind}; accepted are PNG, JPEG and WebP")
    try:
        with Image.open(io.BytesIO(checked_png(data) if kind == "PNG" else data), formats=FORMATS) as image:
            width, height = image.size
            # An MPO is a photo with others of the same scene behind it, and the first one is meant.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise LensError(f"an animation of {image.n_frames} frames; accepted are images of one")
            if width * height <= MAX_PIXELS:
                # Not `convert` where there is nothing to do: it copies, and so does transposing out of place.
                image.load()
                colour.check_tags(image)
                ImageOps.exif_transpose(image, in_place=True)
                return colour.to_srgb(image)
    except MemoryError:
        raise
    except LensError as error:
        raise LensError(f"{where}: {error}") from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, ... on hostile bytes
        reason = f"{type(error).__name__}: {error}".splitlines()[0].split(" <")[0][:120]  # objects have an address
        raise LensError(f"{where}: cannot be decoded as {kind} ({reason})") from error
    raise LensError(f"{where}: image of {width}x{height} pixels; at most {MAX_PIXELS} pixels are accepted")


def checked_png(data: bytes) -> bytes:
    """A PNG without its compressed texts, at whose length PIL ends. LensError for what PIL overlooks."""
    sixteen_bits, dropped = data[24:25] == b"\x10", []
    for name, start, end in _png_chunks(data):
        body = data[start + 8 : end - 4]
        if name == b"cICP" and body[:2] != b"\x01\x0d":
            raise LensError(f"a PNG with the colours of cICP {'-'.join(map(str, body))}; convert it to sRGB")
        if name == b"tRNS" and sixteen_bits:
            raise LensError("a PNG of 16 bits with one transparent colour; store it with an alpha channel")
        text = name == b"zTXt" or (name == b"iTXt" and body[body.find(b"\0") + 1 :][:1] == b"\x01")
        if text and not body.startswith((b"Raw profile type", b"XML:com.adobe.xmp")):  # they may hold the orientation
            dropped.append((start, end))
    if not dropped:
        return data
    starts = [0, *(end for _, end in dropped)]
    return b"".join(data[a:b] for a, b in zip(starts, [*(start for start, _ in dropped), len(data)]))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of every chunk that is whole."""
    start = 8
    while start + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        if (end := start + 12 + length) > len(data):
            return
        if name != b"IDAT":
            yield name, start, end
        start = end


def encode_image(pixels: np.ndarray, encoding: str) -> bytes:
    """Bytes of a uint8 [H, W, 3] image. `encoding` is "png" (exact), "jpeg" (quality 95) or "webp" (quality 92)."""
    from PIL import Image

    options = {
        "png": {"format": "PNG"},
        "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},  # 4:2:0 would blur coloured edges
        "webp": {"format": "WEBP", "quality": 92},
    }
    if encoding not in options:
        raise LensError(f"encoding {encoding!r} is unknown; accepted: {', '.join(options)}")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options[encoding])
    return buffer.getvalue()
