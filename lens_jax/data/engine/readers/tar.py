"""What is in a tar file, by offset: nothing is extracted, and no number in it is believed.

Headers are the standard library's to parse. It does not walk from one to the next: by a header that says so, `TarFile`
reads all that memory holds as a name, goes back in the file, or takes a link for the file it names.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_BLOCK = tarfile.BLOCKSIZE
# Of a name that needs a header of its own.
_MAX_EXTRA = 64 << 10
# Zeros behind an archive that another one may follow, as `cat` puts them.
_MAX_PADDING = 1 << 20
# Of one file: what is known of each is held in memory.
MAX_MEMBERS = 1 << 19


@dataclass(frozen=True)
class Member:
    """A file in a tar."""

    name: str
    # Where its header begins, and its bytes; in bytes from the start of the tar.
    start: int
    offset: int
    size: int
    # Why it cannot be used, one of a few fixed reasons; empty where it can.
    fault: str = ""
    detail: str = ""


def members(file: BinaryIO) -> Iterator[Member]:
    """The files of an uncompressed tar in order, folders left out.

    A tar that is cut short or damaged gives what is whole, and last a member without a name whose fault says why.
    """
    end = file.seek(0, os.SEEK_END)
    position = count = 0
    extra: dict[str, str] = {}
    while True:
        start = position
        header = _read(file, start, _BLOCK)
        if not header.strip(b"\0") and (position := _skip_zeros(file, start, end)) != start:
            if position < end:
                continue
            return
        if len(header) < _BLOCK:
            yield _broken(start, "truncated", "no end of the archive" if not header else "ends in a header")
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError):
            yield _broken(start, "corrupt data" if start else "format not accepted", "no tar header here")
            return
        offset, size = start + _BLOCK, info.size
        if (count := count + 1) > MAX_MEMBERS:
            yield _broken(start, "too many files", f"over {MAX_MEMBERS}; split the tar")
            return
        if info.type in _EXTRA:
            body = _read(file, offset, size) if 0 <= size <= _MAX_EXTRA else b""
            if len(body) != size or size < 0:
                yield _broken(start, "truncated" if offset + size > end else "corrupt data", f"a name of {size} bytes")
                return
            extra |= _extra(info.type, body)
            position = offset + _padded(size)
            continue
        if info.type == tarfile.GNUTYPE_SPARSE:
            offset = _skip_sparse_map(file, header, offset)
        if "size" in extra and info.isreg():
            size = int(extra["size"]) if re.fullmatch(r"[0-9]{1,18}", extra["size"]) else -1
        if size < 0:
            yield _broken(start, "corrupt data", "a size that is none")
            return
        has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        name, sparse = extra.get("path", info.name), "sparse" in extra or info.type == tarfile.GNUTYPE_SPARSE
        position, extra = offset + (_padded(size) if has_data else 0), {}
        if info.isdir():
            continue
        if has_data and offset + size > end:
            yield Member(name, start, offset, 0, "truncated", f"{end - offset} of {size} bytes are there")
            return
        yield Member(name, start, offset, size if has_data else 0, *_fault(info, name, sparse))


# GNU's long names, POSIX's records of a file, and those of all files, of which nothing concerns us.
_EXTRA = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE
)  # fmt: skip


def _fault(info: tarfile.TarInfo, name: str, sparse: bool) -> tuple[str, str]:
    if name.startswith("/") or ".." in name.split("/"):
        return "outside the folder", "an absolute name" if name.startswith("/") else "a name with .."
    if info.issym() or info.islnk():
        return "link", "links are not followed"
    if not info.isreg():
        return "no file", f"a device, a pipe, or of the unknown type {info.type!r}"
    return ("sparse", "a sparse file; write the tar without --sparse") if sparse else ("", "")


def _broken(start: int, fault: str, detail: str) -> Member:
    return Member("", start, start, 0, fault, f"byte {start}: {detail}")


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _skip_zeros(file: BinaryIO, start: int, end: int) -> int:
    """At which block the zeros from `start` on end; the end of the file where too many come."""
    zeros = _read(file, start, _MAX_PADDING)
    if not zeros.strip(b"\0"):
        return end if zeros else start
    return start + (len(zeros) - len(zeros.lstrip(b"\0"))) // _BLOCK * _BLOCK


def _skip_sparse_map(file: BinaryIO, header: bytes, offset: int) -> int:
    more = header[482:483] not in (b"", b"\0")
    while more:
        block = _read(file, offset, _BLOCK)
        offset += _BLOCK
        more = len(block) == _BLOCK and block[504:505] != b"\0"
    return offset


def _extra(kind: bytes, body: bytes) -> dict[str, str]:
    """Of `path`, `size` and `sparse`, what a header that goes before a file's says of it."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": body.split(b"\0")[0].decode("utf-8", "surrogateescape")}
    found: dict[str, str] = {}
    if kind not in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        return found
    while body:
        # Records are "LENGTH KEY=VALUE\n", the length that of all of it.
        digits = body[:20].split(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        key, _, value = body[len(digits) + 1 : length - 1].partition(b"=")
        if length <= len(digits) + 1 or length > len(body):
            break
        text = value.decode("utf-8", "surrogateescape")
        if key in (b"path", b"size"):
            found[key.decode()] = text
        elif key.startswith(b"GNU.sparse."):
            found["sparse"] = text
        body = body[length:]
    return found
