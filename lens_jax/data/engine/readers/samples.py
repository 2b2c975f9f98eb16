"""The samples of a tar in WebDataset's layout: files of one name up to its first dot belong together."""

import json
import os
import posixpath
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from lens_jax.data.engine.config import Source
from lens_jax.data.engine.readers import tar
from lens_jax.data.engine.readers.item import SHA256, Item, Problem, make_item, texts_of
from lens_jax.data.file_kind import HEAD, what_is
from lens_jax.data.images import MAX_ENCODED_BYTES
from lens_jax.data.sources.folder import MAX_TEXT_FILE, SUFFIXES
from lens_jax.data.sources.tables import CAPTION_COLUMNS

# Images that are not read are named for what they are; that is for decoding to say.
IMAGES = (*SUFFIXES, ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2")
TEXTS = ("txt", "caption", "text")
# What a tar may be called that is cut in its first header.
_UNKNOWN = ("empty", "text", "of no known format")
# Fields of a sample's .json, as img2dataset and others name them.
URLS, LICENCES = ("url", "URL"), ("licence", "license", "LICENSE")
COLUMNS = {
    "image": "ending of the image, such as jpg",
    "text": "ending of the caption's file, or its field in the .json",
    "url": "field of the .json with the address",
    "licence": "field of the .json with the licence",
    **SHA256,
}


@dataclass
class Sample:
    """The files of one sample, by what is behind the first dot of their names, in small letters."""

    key: str
    # Where the first of them begins, in bytes from the start of the tar.
    start: int
    files: dict[str, tar.Member] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """What is in a tar, in order of place."""

    samples: Mapping[str, Sample]
    # (place, problem) of what belongs to no sample.
    problems: tuple[tuple[int, Problem], ...]


def contents(file: BinaryIO, name: str) -> Contents:
    """The samples of a tar that is called `name`; a sample's files need not lie beside each other.

    A file that is there twice is a problem the second time. Only headers are read, and of the tar that was looked at
    last not again: the units of a large one come one after the other.
    """
    status = os.fstat(file.fileno())
    key = name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    with _lock:
        if _last.get("key") != key:
            _last.update(key=key, contents=_look(file, name))
        return _last["contents"]


_last: dict = {}
_lock = threading.Lock()


def _look(file: BinaryIO, name: str) -> Contents:
    samples: dict[str, Sample] = {}
    problems = []
    for member in tar.members(file):
        if not member.name:
            fault, detail = member.fault, member.detail
            if member.start == 0:  # not a tar at all
                file.seek(0)
                kind = what_is(file.read(HEAD))
                fault = fault if kind in _UNKNOWN else "format not accepted"
                detail = f"{kind}; an uncompressed tar is needed"
            problems.append((member.start, Problem(name, fault, detail)))
            continue
        path = member.name if member.fault == "outside the folder" else posixpath.normpath(member.name)
        base = posixpath.basename(path)
        hidden = base.startswith(".")
        stem, _, ending = base.partition(".")
        if member.fault == "truncated" and (hidden or not f".{ending.lower()}".endswith(IMAGES)):
            # Its sample may be whole without it, and that the tar is not must be said.
            problems.append((member.start, Problem(name, member.fault, f"in {_storable(path)}: {member.detail}")))
            continue
        if hidden:
            continue
        key = posixpath.join(posixpath.dirname(path), stem)
        sample = samples.setdefault(key, Sample(_storable(f"{name}/{key}"), member.start))
        if ending.lower() in sample.files:
            problem = Problem(_storable(f"{name}/{path}"), "duplicate key", "this name is there before")
            problems.append((member.start, problem))
        else:
            sample.files[ending.lower()] = member
    return Contents(samples, tuple(problems))


def make(source: Source, file: BinaryIO, sample: Sample) -> Item | Problem:
    """The item of a sample, its image and texts read now."""
    data = image(file, sample, source.columns.get("image", ""))
    if isinstance(data, Problem):
        return data
    fields = _fields(file, sample)
    named = lambda column, usual: fields.get(source.columns.get(column) or next((n for n in usual if n in fields), ""))
    texts = _texts(source, file, sample, fields)
    sha256 = fields.get(source.columns.get("sha256"))
    return make_item(source, sample.key, data, texts, named("url", URLS), named("licence", LICENCES), sha256)


def image(file: BinaryIO, sample: Sample, ending: str = "") -> bytes | Problem:
    """The bytes of a sample's image: of that ending, or of the only one that may be meant."""
    member = _image(sample, ending.lower().lstrip("."))
    if isinstance(member, Problem):
        return member
    if member.size > MAX_ENCODED_BYTES:
        return Problem(sample.key, "too large", f"over {MAX_ENCODED_BYTES} bytes")
    return _bytes(file, member)


def _image(sample: Sample, wanted: str) -> tar.Member | Problem:
    found = [wanted] if wanted in sample.files else []
    if not wanted:
        found = [ending for ending in sample.files if f".{ending}".endswith(IMAGES)]
        # photo.jpg and photo.mask.png: the plain one is meant.
        found = [ending for ending in found if f".{ending}" in IMAGES] or found
    faulty = [member for member in sample.files.values() if member.fault]
    if len(found) == 1 and not sample.files[found[0]].fault:
        return sample.files[found[0]]
    if faulty:
        return Problem(sample.key, faulty[0].fault, faulty[0].detail)
    if found:
        return Problem(sample.key, "several images", f"{', '.join(found)[:200]}; say which by columns image")
    return Problem(sample.key, "no image", f"there are .{', .'.join(sample.files)}"[:200])


def _fields(file: BinaryIO, sample: Sample) -> dict:
    member = sample.files.get("json")
    if member is None or member.fault or member.size > MAX_TEXT_FILE:
        return {}
    try:
        values = json.loads(_bytes(file, member))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _texts(source: Source, file: BinaryIO, sample: Sample, fields: dict) -> Mapping[str, list[str]] | Problem:
    wanted = source.columns.get("text", "")
    endings = [ending for ending in ([wanted.lower().lstrip(".")] if wanted else TEXTS) if ending in sample.files]
    if endings:
        member = sample.files[endings[0]]
        if member.fault or member.size > MAX_TEXT_FILE:
            return Problem(sample.key, "bad caption", member.fault or f"over {MAX_TEXT_FILE} bytes")
        try:
            # One text, which may have several lines.
            return texts_of(sample.key, _bytes(file, member).decode("utf-8-sig").strip())
        except UnicodeDecodeError:
            return Problem(sample.key, "bad caption", "not UTF-8")
    column = wanted or next((name for name in CAPTION_COLUMNS if name in fields), "")
    return texts_of(sample.key, fields.get(column))


def _bytes(file: BinaryIO, member: tar.Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _storable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
