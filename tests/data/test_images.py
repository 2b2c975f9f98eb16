"""Images whose form is unusual: used as they are meant to look, or refused for a reason that is in words."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from lens_jax.data.file_kind import what_is
from lens_jax.data.images import decode_image
from lens_jax.errors import LensError


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(row: bytes, *chunks: bytes, depth: int = 8, colour: int = 2, width: int = 1) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def profile(space: bytes, gamma: float, **primaries: tuple[float, float, float]) -> bytes:
    """An ICC profile of curves that are powers; `primaries` r, g, b in XYZ as seen under D50."""
    number = lambda x: struct.pack(">i", round(x * 65536))
    xyz = lambda v: b"XYZ \0\0\0\0" + b"".join(map(number, v))
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(90 - 14)
    white = (0.9642, 1, 0.8249)
    tags = [(b"desc", text), (b"wtpt", xyz(white))]
    tags += [(f"{c}XYZ".encode(), xyz(v)) for c, v in primaries.items()]
    tags += [(f"{c}TRC".encode(), curve) for c in primaries or "k"]
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags:
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(value))
        body += value
    head = struct.pack(">I4sI4s4s4s", 128 + len(table + body), b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + b"".join(map(number, white))
    return head.ljust(128, b"\0") + table + body


P3 = profile(b"RGB ", 2.2, r=(0.5151, 0.2412, -0.0011), g=(0.2920, 0.6922, 0.0419), b=(0.1571, 0.0666, 0.7841))
GREY = profile(b"GRAY", 1.0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREEN = (60, 200, 60)
IN_SRGB = (0, 205, 0)  # what GREEN is where it was meant in Display P3
P3_PALETTE = Image.new("RGB", (2, 2), GREEN).quantize()
HALF_CLEAR = Image.new("RGBA", (2, 2), (*GREEN, 128))
TURNED = Image.Exif()
TURNED[0x0112] = 6
TEXTS = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3 << 20))) + chunk(
    b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(3 << 20))
)
XMP = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<x:xmpmeta><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>")


@pytest.mark.parametrize(
    ("data", "expected"),
    {
        "P3 png": (saved(Image.new("RGB", (2, 2), GREEN), "PNG", icc_profile=P3), IN_SRGB),
        "P3 jpeg": (saved(Image.new("RGB", (2, 2), GREEN), "JPEG", icc_profile=P3), IN_SRGB),
        "P3 webp": (saved(Image.new("RGB", (2, 2), GREEN), "WEBP", icc_profile=P3, lossless=True), IN_SRGB),
        "P3 palette": (saved(P3_PALETTE, "PNG", icc_profile=P3), IN_SRGB),
        "P3 half clear": (saved(HALF_CLEAR, "PNG", icc_profile=P3), (127, 230, 127)),
        "sRGB": (saved(Image.new("RGB", (2, 2), GREEN), "PNG", icc_profile=SRGB), GREEN),
        "sRGB on grey": (saved(Image.new("L", (2, 2), 77), "PNG", icc_profile=SRGB), (77, 77, 77)),
        "linear grey": (saved(Image.new("L", (2, 2), 55), "PNG", icc_profile=GREY), (128, 128, 128)),
        "CMYK": (saved(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
        "grey and alpha": (saved(Image.new("LA", (2, 2), (0, 0)), "PNG"), (255, 255, 255)),
        "half clear": (saved(HALF_CLEAR, "PNG"), (157, 227, 157)),
        "one transparent colour": (png(bytes(GREEN), chunk(b"tRNS", struct.pack(">3H", *GREEN))), (255, 255, 255)),
        "turned": (saved(Image.new("RGB", (2, 2), GREEN), "PNG", exif=TURNED, icc_profile=P3), IN_SRGB),
        "16-bit grey": (png(struct.pack(">H", 25_800), depth=16, colour=0), (100, 100, 100)),
        "16-bit RGB": (png(struct.pack(">3H", 65_535, 0, 257 * 100), depth=16), (255, 0, 100)),
        "16-bit RGBA": (png(struct.pack(">4H", 65_535, 0, 0, 0), depth=16, colour=6), (255, 255, 255)),
        "one bit": (png(b"\x80", depth=1, colour=0), (255, 255, 255)),
        "huge texts": (png(bytes(GREEN), TEXTS), GREEN),
        "gamma of sRGB": (png(bytes(GREEN), chunk(b"gAMA", struct.pack(">I", 45_455))), GREEN),
        "cICP of sRGB": (png(bytes(GREEN), chunk(b"cICP", b"\1\x0d\0\1")), GREEN),
        "a photo and its second view": (
            saved(Image.new("RGB", (8, 8), GREEN), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
            GREEN,
        ),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_colours_are_what_was_meant(data, expected):
    pixel = decode_image(data, "x")[0, 0]
    assert np.abs(pixel.astype(int) - expected).max() <= 3, pixel


def test_a_photo_without_an_interoperability_part(monkeypatch):
    """Of which Pillow before 13 says KeyError, and later ones that it is empty."""

    def missing(exif, tag):
        raise KeyError(tag)

    monkeypatch.setattr(Image.Exif, "get_ifd", missing)
    assert decode_image(saved(Image.new("RGB", (8, 8), (90, 120, 60)), "JPEG"), "x").shape == (8, 8, 3)


WIDE = struct.pack(">8I", 31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600)  # primaries of BT.2020
ADOBE_EXIF = Image.Exif()
ADOBE_EXIF[0x8769] = {0xA005: {1: "R03"}}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (png(bytes(3), chunk(b"gAMA", struct.pack(">I", 100_000))), "gamma 1;"),
        (png(bytes(3), chunk(b"cHRM", WIDE)), "primaries"),
        (png(bytes(3), chunk(b"cICP", b"\x09\x10\0\1")), "9-16-0-1"),
        (png(bytes(6), chunk(b"tRNS", bytes(6)), depth=16), "alpha channel"),
        (saved(Image.new("RGB", (2, 2)), "PNG", icc_profile=b"nonsense" * 30), "profile cannot be read"),
        (saved(Image.new("RGB", (2, 2)), "PNG", icc_profile=P3[:300]), "profile cannot be"),
        (png(bytes(3), chunk(b"iCCP", b"x\0\0" + b"nonsense")), "profile cannot be read"),
        (saved(Image.new("RGB", (2, 2)), "JPEG", icc_profile=GREY), "for 'GRAY', its pixels are RGB"),
        (saved(Image.new("CMYK", (2, 2)), "JPEG", icc_profile=SRGB), "for 'RGB', its pixels are CMYK"),
        (saved(Image.new("RGB", (2, 2)), "JPEG", exif=ADOBE_EXIF), "Adobe RGB"),
        (saved(Image.new("RGB", (2, 2)), "PNG", save_all=True, append_images=[Image.new("RGB", (2, 2), 9)]), "2 fr"),
        (saved(Image.new("RGB", (2, 2)), "WEBP", save_all=True, append_images=[Image.new("RGB", (2, 2), 9)]), "2 fr"),
        (saved(Image.effect_noise((64, 64), 50), "PNG")[:999], "cannot be decoded as PNG"),
        (saved(Image.new("RGB", (2, 2)), "GIF"), "GIF; accepted are PNG"),
        (saved(Image.new("RGB", (2, 2)), "AVIF"), "AVIF; accepted"),
        (saved(Image.new("RGB", (2, 2)), "BMP"), "BMP; accepted"),
        (b"", "empty"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><title>404</title>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"404: Not Found", "text"),
        (bytes(100), "all zero"),
        (b"\xff\xd8\xff\xe0" + bytes(20), "cannot be decoded as JPEG"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_used_is_said_in_the_same_words_every_time(data, words):
    said = set()
    for _ in range(3):
        with pytest.raises(LensError, match=words) as error:
            decode_image(data, "x.png")
        said.add(str(error.value))
    (message,) = said
    assert message.startswith("x.png: ")
    assert " 0x" not in message
    assert "\n" not in message


@pytest.mark.parametrize("turn", [chunk(b"eXIf", TURNED.tobytes()), chunk(b"iTXt", XMP)], ids=["EXIF", "XMP"])
def test_turned_images_stand_upright(turn):
    """Also where the texts of a PNG are long, and the one that turns it is compressed like them."""
    data = saved(Image.new("RGB", (4, 2), "red"), "PNG")
    assert decode_image(data[:33] + turn + TEXTS + data[33:], "x").shape == (4, 2, 3)


def test_first_bytes_say_what_a_file_is():
    """Every format that PIL writes, by the name that our table has for it."""
    names = {"JPEG2000": "JPEG 2000", "PPM": "PNM", "WEBP": "WebP"}
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "DDS"):
        assert what_is(saved(Image.new("RGB", (16, 16)), kind)) == names.get(kind, kind), kind
