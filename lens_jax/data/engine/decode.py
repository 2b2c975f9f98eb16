"""Encoded images to pixels, or the reason why not: step 1 of the cleaning (report, section 2).

JPEGs are decoded by simplejpeg, which says what libjpeg finds wrong in them: Pillow and OpenCV take a file with damaged
data without a word, and show noise for a part of it. What comes out is what `data.images` makes of the same file, but
that of an animation the first frame is taken.
"""

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lens_jax.data import colour, images
from lens_jax.data.engine.container import Layout, layout
from lens_jax.data.engine.extra import needed
from lens_jax.data.file_kind import ACCEPTED, what_is
from lens_jax.errors import LensError

# Why an image cannot be used, for counting. `decoder crashed` is said by whoever runs decoders in a process of theirs.
REASONS = ("format", "bomb", "truncated", "corrupt data", "colour", "decoder crashed")
# Encoders write some ten passes of a progressive JPEG. Ten thousand of an empty one fit in little, and take minutes.
MAX_SCANS = 100
# Images of more pixels are decoded one after the other, whatever the number of threads: 80 megapixels take 600 MB.
_LARGE, _one_large = 16_000_000, threading.Lock()


class Undecodable(Exception):
    """An image that is not used: `reason`, one of REASONS, and a line of detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason} ({detail})")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Limits:
    """What is taken at all."""

    # Images of more pixels and files of more bytes are refused before they are decoded.
    max_pixels: int = images.MAX_PIXELS
    max_bytes: int = images.MAX_ENCODED_BYTES
    # Refuse JPEGs in which the decoder finds anything wrong, such as stray bytes, not only those that it cannot decode.
    strict_jpeg: bool = True


@dataclass(frozen=True)
class Header:
    """What an image is before it is decoded."""

    # JPEG, PNG or WEBP.
    format: str
    # In pixels, turned as EXIF says.
    width: int
    height: int
    # More than 1 for an animation. The further images of an MPO, a photograph's other views, do not count.
    frames: int


def make_quiet() -> None:
    """For a worker: no line of Pillow's for each image with damaged metadata, and no threads of OpenCV's, which would
    spread one image over the cores of all workers."""
    warnings.filterwarnings("ignore", module="PIL")
    needed("cv2").setNumThreads(1)


def read_header(data: bytes, limits: Limits = Limits()) -> Header:
    """What the header says. Undecodable for what can be seen without decoding the image."""
    with _opened(data, limits) as (image, found):
        width, height = image.size
        if _orientation(image, found) >= 5:
            width, height = height, width
        is_jpeg = image.format in ("JPEG", "MPO")
        frames = 1 if is_jpeg else getattr(image, "n_frames", 1)
        return Header("JPEG" if is_jpeg else image.format, width, height, frames)


def decode(data: bytes, limits: Limits = Limits()) -> np.ndarray:
    """uint8 [H, W, 3] in sRGB, turned as EXIF says, transparency on white. Undecodable for what is not whole.

    From any thread.
    """
    with _opened(data, limits) as (image, found):
        large = image.size[0] * image.size[1] > _LARGE
        with _one_large if large else contextlib.nullcontext():
            colour.check_tags(image)
            if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
                return _turned(_jpeg(data, image, limits), _orientation(image, found))
            if image.format in ("JPEG", "MPO") and limits.strict_jpeg:
                _by_simplejpeg(data, "CMYK", True)  # for what it finds wrong; the inks are Pillow's to convert
            return _by_pillow(image)


def _by_pillow(image) -> np.ndarray:
    from PIL import ImageOps

    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return np.asarray(colour.to_srgb(image))


def _jpeg(data: bytes, image, limits: Limits) -> np.ndarray:
    """The pixels of a JPEG whose header Pillow has read, not turned yet."""
    profile = image.info.get("icc_profile")
    if "icc_profile" not in image.info or (image.mode == "RGB" and colour.is_srgb(profile)):
        return _by_simplejpeg(data, "RGB", limits.strict_jpeg)
    from PIL import Image

    pixels = _by_simplejpeg(data, "RGB" if image.mode == "RGB" else "GRAY", limits.strict_jpeg)
    decoded = Image.fromarray(pixels if image.mode == "RGB" else pixels[..., 0])
    decoded.info["icc_profile"] = profile
    return np.asarray(colour.to_srgb(decoded))


def _by_simplejpeg(data: bytes, space: str, strict: bool) -> np.ndarray:
    try:
        return needed("simplejpeg").decode_jpeg(data, space, strict=strict)
    except ValueError as error:
        reason = "truncated" if "Premature end" in str(error) else "corrupt data"
        raise Undecodable(reason, _line(error)) from None


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if not 2 <= orientation <= 8:
        return pixels
    cv2 = needed("cv2")
    if orientation in (2, 3, 4):
        return cv2.flip(pixels, {2: 1, 3: -1, 4: 0}[orientation])
    across = cv2.transpose(pixels)
    return across if orientation == 5 else cv2.flip(across, {6: 1, 7: -1, 8: 0}[orientation])


def _orientation(image, found: Layout) -> int:
    """That of EXIF or XMP, 1 to 8. Of a PNG it costs decoding it, if there is anything that could say it."""
    if not found.may_turn:
        return 1
    orientation = image.getexif().get(0x0112, 1)
    return orientation if isinstance(orientation, int) else 1


@contextlib.contextmanager
def _opened(data: bytes, limits: Limits) -> Iterator[tuple[object, Layout]]:
    """Pillow's image of which only the header has been read. Whatever goes wrong in the block is Undecodable."""
    from PIL import Image

    if len(data) > limits.max_bytes:
        raise Undecodable("bomb", f"a file of {len(data)} bytes; at most {limits.max_bytes} are accepted")
    kind = what_is(data)
    if kind not in ACCEPTED:
        raise Undecodable("format", f"the file is {kind}; accepted are PNG, JPEG and WebP")
    found = layout(data, kind)
    _check(found.width, found.height, found.scans, limits)
    if found.unsupported:
        raise Undecodable("format", found.unsupported)
    if found.ends_early:
        raise Undecodable("truncated", f"the {kind} ends after {len(data)} bytes, before its data does")
    if found.fault:
        raise Undecodable("corrupt data", found.fault)
    try:
        whole = images.checked_png(data) if kind == "PNG" else data
        with Image.open(io.BytesIO(whole), formats=images.FORMATS) as image:
            _check(*image.size, found.scans, limits)
            yield image, found
    except (Undecodable, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise Undecodable("bomb", _line(error)) from None
    except LensError as error:
        if isinstance(error.__cause__, ImportError):
            raise
        raise Undecodable("colour", str(error)) from None
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, ... on hostile bytes
        raise Undecodable("corrupt data", f"{type(error).__name__}: {_line(error)}") from None


def _check(width: int, height: int, scans: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise Undecodable("bomb", f"{width}x{height} pixels; at most {limits.max_pixels} are accepted")
    if scans > MAX_SCANS:
        raise Undecodable("bomb", f"a JPEG of {scans} scans; at most {MAX_SCANS} are accepted")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].split(" <")[0][:120]  # objects are shown with an address
