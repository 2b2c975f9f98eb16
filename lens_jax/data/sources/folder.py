"""Captioned images in a folder of your own.

An image's captions stand in a `.txt` of the same name beside it, one a line, or in a `metadata.jsonl` or
`metadata.csv` in its folder or one above, with the columns `file_name`, one of `text`, `caption` or `captions`, and
optionally `language`. In JSON `captions` may also be a list, or map languages to a text or a list.

Whatever cannot be used comes out as a Problem in place of an example: nothing is skipped silently. A folder may hold
more images than memory their names: what has to be put in order is sorted on disk, names of files and rows of tables.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgpack

from lens_jax.data.external_sort import DiskSort
from lens_jax.data.records import MAX_CAPTIONS, MAX_TEXT
from lens_jax.errors import LensError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
# Images too, so leaving them out is worth a line in the report.
OTHER_SUFFIXES = (
    ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".tga", ".ppm", ".pgm", ".svg",
)  # fmt: skip
TABLES = ("metadata.jsonl", "metadata.csv")
CAPTION_KEYS = ("text", "caption", "captions")
MAX_TEXT_FILE = 1 << 20
# Bytes of names or captions that are in order in memory at a time.
ROOM = 64 << 20


@dataclass(frozen=True)
class Found:
    """An image file."""

    # Path inside the folder, with forward slashes.
    name: str
    path: Path
    # What the tables say of it; None where they say nothing, so that a .txt beside it must.
    captions: Mapping[str, tuple[str, ...]] | None


@dataclass(frozen=True)
class Problem:
    """Something in the folder that cannot be used."""

    # Path inside the folder, with the line where there is one.
    name: str
    # One of a few fixed reasons, for counting.
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class Scan:
    """Every image below a folder, and every problem, in an order that depends on names alone.

    Two passes over the folder: `look` reads the tables and counts, then `items` gives the images.
    """

    def __init__(self, folder: str | os.PathLike, language: str, work: Path, shuffle: int | None = None):
        """`language` is that of captions that name none; what memory does not hold waits in the folder `work`. Images
        come in the order of their names or, with a seed in `shuffle`, in a random one. LensError where no folder is.
        """
        self._root = root_of(folder)
        self._language, self._work, self._shuffle = language, work, shuffle
        self._rows = DiskSort(work, ROOM)

    def look(self) -> Iterator[Problem | None]:
        """The rows of tables that cannot be used, and None for each image."""
        for path, kind in self._walk():
            if kind == _TABLE:
                yield from self._read_table(path)
            elif kind in (_IMAGE, _LINK):
                yield None

    def items(self) -> Iterator[Found | Problem]:
        """The images, which are not opened, and whatever else cannot be used."""
        found = self._join(self._rows.sorted())
        if self._shuffle is None:
            yield from (item if isinstance(item, Problem) else self._found(*item) for item in found)
            return
        drawn = DiskSort(self._work, ROOM)
        for item in found:
            if isinstance(item, Problem):
                yield item
            else:
                key = hashlib.blake2b(b"%d:" % self._shuffle + item[0], digest_size=8).digest()
                drawn.add(key, msgpack.packb(item))
        for _, value in drawn.sorted():
            yield self._found(*msgpack.unpackb(value))

    def _found(self, path: bytes, captions: Mapping | None) -> Found:
        return Found(_readable(path), self._root / os.fsdecode(path), captions)

    def _walk(self, folder: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """(path in the folder, kind) of what concerns us, in the order of `_key`."""
        names = DiskSort(self._work, ROOM)
        try:
            with os.scandir(os.path.join(os.fsencode(self._root), folder)) as entries:
                for entry in entries:
                    if kind := _kind(entry):
                        names.add(entry.name, kind)
        except OSError:
            yield folder, _CLOSED
            return
        for name, kind in names.sorted():
            path = os.path.join(folder, name)
            if kind == _FOLDER:
                yield from self._walk(path)
            else:
                yield path, kind

    def _join(self, rows: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, dict | None] | Problem]:
        """The images with what the tables say of them: both come in the same order."""
        row = next(rows, None)
        for path, kind in self._walk():
            key, captions = _key(path), None
            while row and row[0] < key:
                yield _unmatched(row[1])
                row = next(rows, None)
            while row and row[0] == key:
                captions = captions or {}
                for language, lines in msgpack.unpackb(row[1])[2].items():
                    captions.setdefault(language, []).extend(lines)
                row = next(rows, None)
            if kind == _IMAGE:
                yield path, captions
            elif problem := self._refuse(path, kind):
                yield problem
            elif kind == _LINK:
                yield path, captions
        while row:
            yield _unmatched(row[1])
            row = next(rows, None)

    def _refuse(self, path: bytes, kind: bytes) -> Problem | None:
        name = _readable(path) or "."
        if kind == _OTHER:
            return Problem(name, "format not accepted", f"accepted: {', '.join(SUFFIXES)}")
        if kind == _LINKED_FOLDER:
            return Problem(name, "linked folder", "give the folder that the link leads to as a source of its own")
        if kind == _CLOSED:
            return Problem(name, "cannot be read", "this folder cannot be opened")
        if kind == _LINK and not (self._root / os.fsdecode(path)).resolve().is_relative_to(self._root):
            return Problem(name, "outside the folder", "a link that leads out of it")
        return None

    def _read_table(self, path: bytes) -> Iterator[Problem]:
        """Takes the rows of one table; yields those that cannot be used."""
        file, where = self._root / os.fsdecode(path), _readable(path)
        try:
            for line, row in _json_rows(file) if file.suffix == ".jsonl" else _csv_rows(file):
                name = f"{where}:{line}"
                try:
                    image, texts = _parse_row(row, self._language)
                except ValueError as error:
                    yield Problem(name, "bad row", str(error))
                    continue
                target = os.path.normpath(os.path.join(os.path.dirname(path), os.fsencode(image)))
                if os.path.isabs(target) or target.split(b"/")[0] == b"..":
                    yield Problem(name, "outside the folder", f"file_name {image!r:.80}")
                else:
                    self._rows.add(_key(target), msgpack.packb([name, image, texts]))
        except (UnicodeDecodeError, csv.Error, OSError) as error:
            yield Problem(where, "bad row", f"reading stopped: {type(error).__name__}: {error}"[:160])


_IMAGE, _LINK, _OTHER, _TABLE, _FOLDER, _LINKED_FOLDER, _CLOSED = b"i", b"l", b"o", b"t", b"f", b"F", b"c"


def root_of(folder: str | os.PathLike) -> Path:
    """The folder, resolved; LensError where there is none."""
    if not Path(folder).is_dir():
        raise LensError(f"{folder}: no such folder")
    return Path(folder).resolve()


def _kind(entry: os.DirEntry) -> bytes | None:
    """What a file or folder is to us; None for nothing."""
    if entry.name.startswith(b"."):
        return None
    if entry.is_dir():
        return _LINKED_FOLDER if entry.is_symlink() else _FOLDER
    name = os.fsdecode(entry.name)
    suffix = os.path.splitext(name)[1].lower()
    if suffix in SUFFIXES:
        return _LINK if entry.is_symlink() else _IMAGE
    if suffix in OTHER_SUFFIXES:
        return _OTHER
    return _TABLE if name in TABLES else None


def _key(path: bytes) -> bytes:
    # So that order is by folder first, as in a walk: no name holds a zero byte, and none sorts before it.
    return path.replace(b"/", b"\0")


def _unmatched(row: bytes) -> Problem:
    name, image, _ = msgpack.unpackb(row)
    return Problem(name, "missing image", f"file_name {image!r:.80}")


def _readable(path: bytes) -> str:
    # File names need not be UTF-8; what is stored and printed must be.
    return path.decode("utf-8", "replace")


def captions_of(found: Found, language: str) -> Mapping[str, tuple[str, ...]] | Problem:
    """Captions by language of an image, from the tables or from the .txt beside it."""
    if found.captions is not None:
        return _checked(found.name, found.captions)
    text = found.path.with_suffix(".txt")
    try:
        if not text.is_file():
            detail = "neither a .txt beside it nor a row in metadata.jsonl or metadata.csv"
            return Problem(found.name, "no caption", detail)
        if text.stat().st_size > MAX_TEXT_FILE:
            return Problem(found.name, "bad caption", f"{text.name} is over {MAX_TEXT_FILE} bytes")
        return _checked(found.name, {language: text.read_text(encoding="utf-8-sig").splitlines()})
    except (OSError, UnicodeDecodeError) as error:
        return Problem(found.name, "bad caption", f"{text.name} cannot be read as UTF-8: {type(error).__name__}")


def _checked(name: str, texts: Mapping[str, list[str]]) -> Mapping[str, tuple[str, ...]] | Problem:
    kept = {language: tuple(text.strip() for text in lines if text.strip()) for language, lines in texts.items()}
    kept = {language: lines for language, lines in kept.items() if lines}
    if not kept:
        return Problem(name, "empty caption")
    if any(len(lines) > MAX_CAPTIONS or max(map(len, lines)) > MAX_TEXT for lines in kept.values()):
        return Problem(name, "bad caption", f"over {MAX_TEXT} characters, or over {MAX_CAPTIONS} captions a language")
    return kept


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
    with open(path, encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if text.strip():
                try:
                    yield line, json.loads(text)
                except (ValueError, RecursionError):
                    yield line, None


def _csv_rows(path: Path) -> Iterator[tuple[int, object]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row:  # where DictReader puts what has no column
                yield reader.line_num, ValueError("more cells than columns; a text with commas needs quotes")
                continue
            # An empty cell is an absent one, so that a table may leave `language` open.
            yield reader.line_num, {key: value for key, value in row.items() if key and value is not None}


def _parse_row(row: object, language: str) -> tuple[str, dict[str, list[str]]]:
    """(file name, captions by language) of one row; ValueError says what is wrong with it."""
    if not isinstance(row, dict):
        raise row if isinstance(row, ValueError) else ValueError("not a JSON object")
    image = row.get("file_name")
    if not isinstance(image, str) or not 0 < len(image) <= 1000 or "\0" in image or not _is_unicode(image):
        raise ValueError("file_name must be a text of 1 to 1000 characters")
    present = [key for key in CAPTION_KEYS if key in row]
    if len(present) != 1:
        raise ValueError(f"needs exactly one of {', '.join(CAPTION_KEYS)}")
    given = row[present[0]]
    language = row.get("language") or language
    texts = given if isinstance(given, dict) else {language: given}
    texts = {key: [value] if isinstance(value, str) else value for key, value in texts.items()}
    for key, lines in texts.items():
        if not _is_unicode(key) or not 0 < len(key) <= 32:
            raise ValueError("a language must be a text of 1 to 32 characters")
        if not isinstance(lines, list) or not all(map(_is_unicode, lines)):
            raise ValueError(f"{present[0]} must be a text, a list of texts, or map languages to them")
    return image, texts


def _is_unicode(value: object) -> bool:
    # JSON can spell half a surrogate pair, which no file or record can hold.
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
