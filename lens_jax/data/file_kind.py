"""What a file is by its first bytes, in a word: endings lie, and what is left out should be named for what it is."""

# The formats that are read.
ACCEPTED = ("PNG", "JPEG", "WebP")
HEAD = 64  # bytes that are looked at
LFS_POINTER = "a Git LFS pointer (run: git lfs pull)"
# Images that are not read.
OTHER_IMAGES = (
    "GIF", "BMP", "TIFF", "AVIF", "HEIC", "JPEG XL", "JPEG 2000", "PSD", "SVG", "OpenEXR", "Radiance HDR", "DDS", "QOI",
    "PNM", "ICO",
)  # fmt: skip

_BEGINS = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"8BPS", "PSD"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"\0\0\1\0", "ICO"),
    (b"version https://git-lfs", LFS_POINTER),
    (b"%PDF", "PDF"),
    (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "gzip"),
    (b"PAR1", "Parquet"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"mif1": "HEIC",
           b"msf1": "HEIC"}  # fmt: skip


def what_is(head: bytes) -> str:
    """What a file of these first bytes is: PNG, another format, `empty`, `text`, or `of no known format`."""
    head = bytes(head[:HEAD])
    if not head:
        return "empty"
    for begin, name in _BEGINS:
        if head.startswith(begin):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "an MP4 video")
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "BMP"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PNM"
    return _text(head)


def _text(head: bytes) -> str:
    if not head.strip(b"\0"):
        return "all zero"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "HTML"
    if start.startswith(b"<svg"):
        return "SVG"
    if start.startswith((b"<?xml", b"<")):
        return "XML"
    plain = all(byte >= 32 or byte in b"\t\r\n" for byte in head)
    return "text" if plain and start else "of no known format"
