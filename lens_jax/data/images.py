"""Encoded image <-> uint8 [H, W, 3]. The bytes may come from anywhere, so they are treated as hostile."""

import io

import numpy as np

from lens_jax.errors import LensError

# PIL offers some forty formats, several with parsers nobody fuzzes; these three are what records may hold.
FORMATS = ("PNG", "JPEG", "WEBP")
# 80 megapixels lie below PIL's own warning (89) and cost 240 MB decoded; larger images are bombs or mistakes.
MAX_PIXELS = 80_000_000
MAX_ENCODED_BYTES = 64 << 20


def decode_image(data: bytes, where: str) -> np.ndarray:
    """uint8 [H, W, 3] of PNG, JPEG or WebP bytes, see `open_image`."""
    return np.asarray(open_image(data, where))


def open_image(data: bytes, where: str):
    """The RGB image, one of PIL's, in PNG, JPEG or WebP bytes; EXIF orientation applied, transparency on white.

    To resize it at once: arrays in between cost a sixth of decoding. Raises LensError naming `where` for anything that
    is not such a image.
    """
    from PIL import Image, ImageOps

    if len(data) > MAX_ENCODED_BYTES:
        raise LensError(f"{where}: image of {len(data)} bytes; at most {MAX_ENCODED_BYTES} are accepted")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                # Not `convert` where there is nothing to do: it copies, and so does transposing out of place.
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return image if image.mode == "RGB" and "transparency" not in image.info else _to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, ... on hostile bytes
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise LensError(f"{where}: cannot be decoded as PNG, JPEG or WebP ({reason})") from error
    raise LensError(f"{where}: image of {width}x{height} pixels; at most {MAX_PIXELS} pixels are accepted")


def _to_rgb(image):
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # 16-bit grey: PIL would clip at 255 instead of scaling
        grey = np.asarray(image).astype(np.float64) / 257.0
        image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8), "L")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


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
