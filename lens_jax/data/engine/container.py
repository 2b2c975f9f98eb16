"""What the structure of a PNG, JPEG or WebP says before anything is decoded: its size, and whether it is whole.

Decoders allocate by what the header says and give up late or never, so that bombs, files that end early and PNGs whose
checksums do not fit are found here.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that begin a JPEG's frame
_DECODED_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # baseline, extended and progressive; Huffman or arithmetic
_BEGINS_SEGMENT = np.array([code >= 0xC0 and code not in (*range(0xD0, 0xD9), 0xFF) for code in range(256)])
# Bytes that are searched at a time.
_BLOCK = 1 << 20
# A PNG has some dozens to some thousands; reading a million of empty ones takes minutes.
MAX_CHUNKS = 100_000
# Chunks of a PNG that may hold an orientation.
_METADATA = (b"eXIf", b"zTXt", b"tEXt", b"iTXt")


@dataclass(frozen=True)
class Layout:
    """The structure of an encoded image."""

    # In pixels as stored, before it is turned; 0 where the header does not get so far.
    width: int = 0
    height: int = 0
    # Whether data is missing at the end.
    ends_early: bool = False
    # What is wrong, or empty.
    fault: str = ""
    # A variant that decoders here do not read, or empty.
    unsupported: str = ""
    # Passes over the image of a progressive JPEG: time grows with them, however small the file.
    scans: int = 1
    # Whether it may say that it has to be turned.
    may_turn: bool = True


def layout(data: bytes, kind: str) -> Layout:
    """The structure of an image of that kind, one of file_kind.ACCEPTED."""
    return {"JPEG": _jpeg, "PNG": _png, "WebP": _webp}[kind](data)


def _jpeg(data: bytes) -> Layout:
    width = height = scans = 0
    unsupported, position = "", 2
    for at in _markers(data):
        if at < position:  # within the segment of another marker
            continue
        marker = data[at + 1]
        if marker == 0xD9:
            fault = "" if scans else "a JPEG without an image in it"
            return Layout(width, height, False, fault, unsupported, max(scans, 1))
        if at + 4 > len(data):
            break
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker in _FRAMES and length >= 8 and at + 9 <= len(data) and not width:
            bits, height, width = struct.unpack_from(">BHH", data, at + 4)
            if marker not in _DECODED_FRAMES or bits != 8:
                unsupported = f"a JPEG of process {marker - 0xC0} with {bits} bits; accepted are those of 8 that lose"
        scans += marker == 0xDA
        position = at + 2 + max(length, 2)
    return Layout(width, height, True, "", unsupported, max(scans, 1))


def _markers(data: bytes) -> Iterator[int]:
    """Where 0xff is followed by what begins a segment or ends the image, anywhere in a JPEG behind its first marker.

    In compressed data it is followed by 0 or the number of a restart.
    """
    codes = np.frombuffer(data, np.uint8)
    for start in range(2, len(codes), _BLOCK):
        block = codes[start : start + _BLOCK + 1]
        found = np.flatnonzero(block[:-1] == 0xFF)
        yield from (start + found[_BEGINS_SEGMENT[block[found + 1]]]).tolist()


def _png(data: bytes) -> Layout:
    width = height = 0
    may_turn, start = False, 8
    for _ in range(MAX_CHUNKS):
        if start + 12 > len(data):
            return Layout(width, height, ends_early=True, may_turn=may_turn)
        length, name = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            return Layout(width, height, ends_early=True, may_turn=may_turn)
        if name == b"IHDR" and length >= 8:
            width, height = struct.unpack_from(">II", data, start + 8)
        may_turn |= name in _METADATA
        if zlib.crc32(memoryview(data)[start + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            shown = name.decode("ascii", "replace")
            return Layout(width, height, fault=f"the checksum of chunk {shown!r} does not fit", may_turn=may_turn)
        if name == b"IEND":
            return Layout(width, height, may_turn=may_turn)
        start = end
    return Layout(width, height, fault=f"a PNG of over {MAX_CHUNKS} chunks", may_turn=may_turn)


def _webp(data: bytes) -> Layout:
    width = height = 0
    (length,) = struct.unpack_from("<I", data, 4)
    head = data[12:30].ljust(18, b"\0")
    if head[:4] == b"VP8X":
        width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (12, 15))
    elif head[:4] == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 9)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif head[:4] == b"VP8 ":
        width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", head, 14))
    return Layout(width, height, ends_early=length + 8 > len(data))
