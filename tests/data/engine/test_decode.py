"""Step 1: what does not decode whole is refused for the right reason, and everything else is what Pillow shows."""

import contextlib
import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from lens_jax.data import images
from lens_jax.data.engine import decode as module
from lens_jax.data.engine.decode import Limits, Undecodable, decode, read_header
from lens_jax.errors import LensError

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (9, 12, 3), np.uint8)
# 300 x 200 with edges and gradients, as a photograph has.
PICTURE = Image.fromarray(NOISE).resize((300, 200), Image.Resampling.BICUBIC)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refused(data: bytes, **limits) -> str:
    """Why it is not decoded."""
    with pytest.raises(Undecodable) as caught:
        decode(data, Limits(**limits))
    assert caught.value.reason in module.REASONS
    assert "\n" not in caught.value.detail
    return caught.value.reason


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def flipped(data: bytes, bits: int, rng, first: int) -> bytes:
    damaged = bytearray(data)
    for at in rng.choice(len(data) - first, bits, replace=False):
        damaged[first + at] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


JPEGS = {
    "4:2:0": saved(PICTURE, "JPEG", quality=85),
    "4:4:4": saved(PICTURE, "JPEG", quality=95, subsampling=0),
    "progressive": saved(PICTURE, "JPEG", quality=85, progressive=True),
    "restarts": saved(PICTURE, "JPEG", quality=85, restart_marker_blocks=4),
    "grey": saved(PICTURE.convert("L"), "JPEG"),
    "CMYK": saved(PICTURE.convert("CMYK"), "JPEG"),
    "sRGB profile": saved(PICTURE, "JPEG", icc_profile=SRGB),
    "grey with a profile of RGB": saved(PICTURE.convert("L"), "JPEG", icc_profile=SRGB),
    "followed by other data": saved(PICTURE, "JPEG") + b"\xff\xd8\xff\xc0" * 100,
    **{f"EXIF {n}": saved(PICTURE, "JPEG", exif=turned(n)) for n in range(1, 9)},
    "EXIF 6, CMYK": saved(PICTURE.convert("CMYK"), "JPEG", exif=turned(6)),
}
OTHERS = {
    "png": saved(PICTURE, "PNG"),
    "png, palette": saved(PICTURE.quantize(64), "PNG"),
    "png, one bit": saved(PICTURE.convert("1"), "PNG"),
    "png, 16 bits of grey": saved(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257), "PNG"),
    "png, alpha": saved(Image.fromarray(RNG.integers(0, 256, (9, 12, 4), np.uint8)), "PNG"),
    "png, EXIF 6": saved(PICTURE, "PNG", exif=turned(6)),
    "webp": saved(PICTURE, "WEBP", quality=80),
    "webp, lossless": saved(PICTURE, "WEBP", lossless=True),
    "webp, EXIF 8": saved(PICTURE, "WEBP", exif=turned(8)),
}


@pytest.mark.parametrize("data", (JPEGS | OTHERS).values(), ids=(JPEGS | OTHERS).keys())
def test_pixels_are_those_of_prepare(data):
    """The two paths to a data set, `prepare` and the engine, agree to the bit, though JPEGs are decoded otherwise."""
    pixels = decode(data)
    np.testing.assert_array_equal(pixels, images.decode_image(data, "there"))
    assert pixels.dtype == np.uint8
    header = read_header(data)
    assert (header.height, header.width, 3) == pixels.shape
    assert header.frames == 1


def test_turned_by_exif():
    assert read_header(JPEGS["EXIF 6"]).width == read_header(OTHERS["png, EXIF 6"]).width == 200
    assert decode(JPEGS["EXIF 6"]).shape == (300, 200, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_at_each_of_twenty_places(kind):
    whole = saved(PICTURE, kind)
    for place in range(20):
        assert refused(whole[: 40 + (len(whole) - 41) * place // 19]) == "truncated", place


def test_a_thumbnail_does_not_hide_the_missing_end():
    """The EXIF of a camera holds a whole JPEG, with an end of its own."""
    thumbnail = saved(PICTURE.resize((16, 16)), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 8 + len(thumbnail)) + b"Exif\0\0" + thumbnail
    whole = JPEGS["4:2:0"][:2] + segment + JPEGS["4:2:0"][2:]
    np.testing.assert_array_equal(decode(whole), decode(JPEGS["4:2:0"]))
    assert {refused(whole[:size]) for size in (len(segment) + 10, len(whole) // 2, len(whole) - 1)} == {"truncated"}


def test_png_is_checked_to_the_last_bit():
    """Its checksums find any flip, also where Pillow would not look."""
    data, rng = OTHERS["png"], np.random.default_rng(1)
    for _ in range(100):
        assert refused(flipped(data, 1, rng, 8)) in ("corrupt data", "truncated", "bomb")


def test_jpeg_damage_that_pillow_accepts():
    """Of JPEGs with flipped bits that Pillow shows without a word, some are refused; no whole one ever is."""
    rng, accepted, found = np.random.default_rng(2), 0, 0
    for _ in range(100):
        data = flipped(JPEGS["4:2:0"], 3, rng, 700)
        try:
            np.asarray(Image.open(io.BytesIO(data)))
        except OSError:
            continue
        accepted += 1
        try:
            decode(data)
        except Undecodable:
            found += 1
    assert accepted > 90
    assert found > 0.2 * accepted


def test_not_strict_takes_what_a_decoder_only_warns_of():
    data = JPEGS["4:2:0"][:-2] + b"stray" * 10 + JPEGS["4:2:0"][-2:]
    assert refused(data) == "corrupt data"
    np.testing.assert_array_equal(decode(data, Limits(strict_jpeg=False)), decode(JPEGS["4:2:0"]))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (64, 48), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    for kind in ("WEBP", "PNG"):
        data = saved(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert read_header(data).frames == 3
        np.testing.assert_array_equal(decode(data), np.asarray(frames[0]))


def test_other_views_of_a_photograph_are_no_frames():
    data = saved(PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(180)])
    assert read_header(data) == module.Header("JPEG", 300, 200, 1)
    assert decode(data).shape == (200, 300, 3)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def claimed(kind: str, side: int) -> bytes:
    """An image whose header claims side x side pixels, whole otherwise."""
    if kind == "PNG":
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
        return data
    if kind == "WEBP":  # of an extended one, whose canvas may be of 2**24
        body = b"VP8X" + struct.pack("<II", 10, 0) + (side - 1).to_bytes(3, "little") * 2 + OTHERS["webp"][12:]
        return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
    at = JPEGS["4:2:0"].index(b"\xff\xc0")
    return JPEGS["4:2:0"][: at + 5] + struct.pack(">HH", side, side) + JPEGS["4:2:0"][at + 9 :]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_bombs_are_refused_before_anything_is_decoded(kind, monkeypatch):
    def opened(*_, **__):
        raise AssertionError("opened")

    monkeypatch.setattr(Image, "open", opened)
    assert refused(claimed(kind, 30_000)) == "bomb"
    with pytest.raises(Undecodable, match="bomb"):
        read_header(claimed(kind, 30_000))


def test_other_bombs():
    assert refused(JPEGS["4:2:0"], max_bytes=1000) == "bomb"
    assert refused(JPEGS["4:2:0"], max_pixels=300 * 200 - 1) == "bomb"
    assert decode(JPEGS["4:2:0"], Limits(max_pixels=300 * 200)).shape == (200, 300, 3)
    # Passes of which each takes as long as a whole image, in a file of some kilobytes.
    whole = JPEGS["progressive"]
    last = whole.rindex(b"\xff\xda")
    assert refused(whole[:-2] + whole[last:-2] * 1000 + b"\xff\xd9") == "bomb"
    # A text of a gigabyte, which is not unpacked.
    texts = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(8 << 20)))
    np.testing.assert_array_equal(decode(OTHERS["png"][:33] + texts + OTHERS["png"][33:]), np.asarray(PICTURE))
    assert refused(OTHERS["png"][:33] + chunk(b"teSt", b"") * 200_000 + OTHERS["png"][33:]) == "corrupt data"


REFUSED = {
    "nothing": (b"", "format"),
    "GIF": (saved(PICTURE, "GIF"), "format"),
    "BMP": (saved(PICTURE, "BMP"), "format"),
    "HTML": (b"<!doctype html><html>404", "format"),
    "zeros": (bytes(100), "format"),
    "JPEG of 12 bits": (JPEGS["4:2:0"].replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"), "format"),
    "lossless JPEG": (JPEGS["4:2:0"].replace(b"\xff\xc0", b"\xff\xc3"), "format"),
    "JPEG that only begins": (b"\xff\xd8\xff", "truncated"),
    "JPEG without an image": (b"\xff\xd8\xff\xe0\0\2\xff\xd9", "corrupt data"),
    "JPEG without tables": (JPEGS["4:2:0"].replace(b"\xff\xdb", b"\xff\xe5"), "corrupt data"),
    "PNG without pixels": (claimed("PNG", 0), "corrupt data"),
    "PNG of too little data": (claimed("PNG", 100), "corrupt data"),
    "PNG of other colours": (
        OTHERS["png"][:33] + chunk(b"gAMA", struct.pack(">I", 100_000)) + OTHERS["png"][33:],
        "colour",
    ),
}


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_reasons(data, reason):
    assert refused(data) == reason


def test_large_ones_take_turns(monkeypatch):
    """What is over the limit is decoded under the lock, and the lock is free again whatever comes of it."""
    monkeypatch.setattr(module, "_LARGE", 1000)
    for data in (JPEGS["4:2:0"], JPEGS["4:2:0"][:-2] + b"stray" * 10 + JPEGS["4:2:0"][-2:]):
        with contextlib.suppress(Undecodable):
            decode(data)
        assert not module._one_large.locked()


def test_a_package_that_is_missing_is_not_the_images_fault(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(LensError, match=r"lens-jax\[data\]"):
        decode(JPEGS["4:2:0"])
