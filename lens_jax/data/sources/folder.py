"""Captioned images in a folder of your own.

An image's captions stand in a text file beside it, one a line: `photo.txt`, `photo.caption`, or the same behind the
whole name, `photo.png.txt`. Or in a `metadata.jsonl`, `.csv` or `.parquet` in its folder or one above (see `tables`),
which goes before a text file. In JSON captions may also be a list, or map languages to a text or a list. Rows of the
same image add up.

Whatever cannot be used comes out as a Problem in place of an example: nothing is skipped silently, but for names that
begin with a dot. A folder may hold more images than memory their names: what has to be put in order is sorted on disk,
names of files and rows of tables.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgpack

from lens_jax.data import file_kind
from lens_jax.data.external_sort import DiskSort
from lens_jax.data.records import MAX_CAPTIONS, MAX_LANGUAGES, MAX_TEXT, text_fault
from lens_jax.data.sources import tables
from lens_jax.data.sources.tables import TABLES, Columns
from lens_jax.errors import LensError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
CAPTION_FILES = (".txt", ".caption")
# What may be an example's too, so leaving it out is worth a line: captions in other forms, packed images, films.
_OTHER_SUFFIXES = (
    ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".tar", ".tgz", ".zip", ".7z", ".rar", ".gz", ".mp4", ".webm",
    ".mov", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".tga", ".ppm", ".pgm",
    ".pbm", ".pnm", ".svg", ".psd", ".exr", ".hdr", ".dds", ".ico", ".qoi", ".dng", ".cr2", ".cr3", ".nef", ".arw",
    ".raw", ".apng",
)  # fmt: skip
# Not worth opening to see whether they are images.
_TEXT_SUFFIXES = (*CAPTION_FILES, ".json", ".md", ".yaml", ".yml", ".xml", ".py", ".npz", ".npy", ".safetensors")
# Beside an image without a caption, these are named.
_NOT_READ = (".json", ".text", ".tags", ".cap", ".captions", ".md", ".xml", ".yaml")
MAX_TEXT_FILE = 1 << 20
# Bytes of names or captions that are in order in memory at a time.
ROOM = 64 << 20


@dataclass(frozen=True)
class Options:
    """What is taken for a caption."""

    columns: Columns = field(default_factory=Columns)
    # Endings of caption files, the first that is there counts.
    caption_files: tuple[str, ...] = CAPTION_FILES
    # Whether links that lead out of the folder, and to folders, are followed.
    follow_links: bool = False


@dataclass(frozen=True)
class Found:
    """An image file."""

    # Path inside the folder, with forward slashes.
    name: str
    path: Path
    # What the tables say of it; None where they say nothing, so that a caption file beside it must.
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

    def __init__(self, folder: str | os.PathLike, work: Path, options: Options = Options(), shuffle: int | None = None):
        """What memory does not hold waits in the folder `work`. Images come in the order of their names or, with a seed
        in `shuffle`, in a random one. LensError where no folder is.
        """
        self._root = root_of(folder)
        self._options, self._work, self._shuffle = options, work, shuffle
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

    def captions_of(self, found: Found) -> Mapping[str, tuple[str, ...]] | Problem:
        """Captions by language of an image, from the tables or from the file beside it. From any thread."""
        if found.captions is not None:
            return check_captions(found.name, found.captions)
        file = _caption_file(found.path, self._options.caption_files)
        if file is None:
            return Problem(found.name, "no caption", self._missing(found.path))
        try:
            if file.is_symlink() and not self._inside(file):
                return Problem(found.name, "bad caption", f"{_shown(file)} is a link out of the folder")
            with open(file, "rb") as text:
                data = text.read(MAX_TEXT_FILE + 1)
        except OSError as error:
            return Problem(found.name, "bad caption", f"{_shown(file)} cannot be read: {error.strerror}")
        if len(data) > MAX_TEXT_FILE:
            return Problem(found.name, "bad caption", f"{_shown(file)} is over {MAX_TEXT_FILE} bytes")
        if file_kind.what_is(data) == file_kind.LFS_POINTER:
            return Problem(found.name, "bad caption", f"{_shown(file)} is {file_kind.LFS_POINTER}")
        try:
            # Not splitlines: that also ends a line at U+2028 and others, in the middle of a caption.
            lines = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
        except UnicodeDecodeError:
            return Problem(found.name, "bad caption", f"{_shown(file)} is not UTF-8")
        return check_captions(found.name, {self._options.columns.language: lines})

    def _missing(self, path: Path) -> str:
        beside = (path.with_suffix(suffix) for suffix in (*CAPTION_FILES, *_NOT_READ))
        if other := next((file for file in beside if file.is_file()), None):
            return f"{_shown(other)} lies beside it, which is not read"
        files = " or ".join(self._options.caption_files)
        return f"neither a {files} beside it nor a row in {' or '.join(TABLES)}"

    def _found(self, path: bytes, captions: Mapping | None) -> Found:
        return Found(_readable(path), self._root / os.fsdecode(path), captions)

    def _inside(self, path: Path) -> bool:
        try:
            return self._options.follow_links or path.resolve().is_relative_to(self._root)
        except (OSError, RuntimeError):  # links that lead to each other
            return False

    def _walk(self, folder: bytes = b"", above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[bytes, bytes]]:
        """(path in the folder, kind) of what concerns us, in the order of `_key`; `above` are the folders around it."""
        names = DiskSort(self._work, ROOM)
        try:
            place = os.path.join(os.fsencode(self._root), folder)
            status = os.stat(place)
            if (here := (status.st_dev, status.st_ino)) in above:
                yield folder, _CIRCLE
                return
            with os.scandir(place) as entries:
                for entry in entries:
                    if kind := _kind(entry, self._options.follow_links):
                        names.add(entry.name, kind)
        except OSError:
            yield folder, _CLOSED
            return
        for name, kind in names.sorted():
            path = os.path.join(folder, name)
            if kind == _FOLDER:
                yield from self._walk(path, (*above, here))
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
                    if language in captions or len(captions) <= MAX_LANGUAGES:  # one too many, to be refused
                        held = captions.setdefault(language, [])
                        held.extend(lines[: MAX_CAPTIONS + 1 - len(held)])
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
            what = _content(os.path.join(os.fsencode(self._root), path))
            is_table = os.path.splitext(name)[1].lower() in (".jsonl", ".csv", ".tsv", ".json", ".parquet", ".arrow")
            accepted = f"tables are {' and '.join(TABLES)}" if is_table else f"images are {', '.join(SUFFIXES)}"
            return Problem(name, "format not accepted", f"{what}; {accepted}")
        if kind == _LINKED_FOLDER:
            return Problem(name, "linked folder", "read with --follow-links")
        if kind == _CIRCLE:
            return Problem(name, "linked folder", "leads back to a folder that it lies in")
        if kind == _CLOSED:
            return Problem(name, "cannot be read", "this folder cannot be opened")
        if kind == _NO_FILE:
            return Problem(name, "cannot be read", "no file, but a device, a pipe, or a link that leads nowhere")
        if kind == _LINK and not self._inside(self._root / os.fsdecode(path)):
            return Problem(name, "outside the folder", "a link that leads out of it; read with --follow-links")
        return None

    def _read_table(self, path: bytes) -> Iterator[Problem]:
        """Takes the rows of one table; yields those that cannot be used."""
        file, where = self._root / os.fsdecode(path), _readable(path)
        if file.is_symlink() and not self._inside(file):
            yield Problem(where, "outside the folder", "a link that leads out of it; read with --follow-links")
            return
        try:
            for line, row in tables.rows(file, self._options.columns):
                name = f"{where}:{line}"
                if isinstance(row, str):
                    yield Problem(name, "bad row", row)
                    continue
                target = os.path.normpath(os.path.join(os.path.dirname(path), os.fsencode(row.image)))
                if os.path.isabs(target) or target.split(b"/")[0] == b"..":
                    yield Problem(name, "outside the folder", f"{self._options.columns.file} {row.image!r:.80}")
                else:
                    self._rows.add(_key(target), msgpack.packb([name, row.image, row.captions]))
        except OSError as error:
            yield Problem(where, "bad row", f"reading stopped: {error.strerror}")


_IMAGE, _LINK, _OTHER, _TABLE, _FOLDER, _LINKED_FOLDER, _CLOSED = b"i", b"l", b"o", b"t", b"f", b"F", b"c"
_CIRCLE, _NO_FILE = b"C", b"n"


def root_of(folder: str | os.PathLike) -> Path:
    """The folder, resolved; LensError where there is none."""
    if not Path(folder).is_dir():
        raise LensError(f"{folder}: no such folder")
    return Path(folder).resolve()


def _kind(entry: os.DirEntry, follow_links: bool) -> bytes | None:
    """What a file or folder is to us; None for nothing."""
    if entry.name.startswith(b"."):
        return None
    try:
        is_folder, is_file = entry.is_dir(), entry.is_file()  # no call to the system but for links
    except OSError:  # a link to itself
        is_folder = is_file = False
    linked = entry.is_symlink() and not follow_links
    if is_folder:
        return _LINKED_FOLDER if linked else _FOLDER
    name = os.fsdecode(entry.name)
    stem, suffix = os.path.splitext(name.lower())
    table = name.lower() in TABLES
    other = suffix in _OTHER_SUFFIXES or (suffix == ".json" and stem in ("metadata", "captions"))
    if not is_file:
        return _NO_FILE if table or other or suffix in SUFFIXES else None
    if table:
        return _TABLE
    if suffix in SUFFIXES:
        return _LINK if linked else _IMAGE
    if suffix in _TEXT_SUFFIXES and not other:
        return None
    # Whatever its ending, or without one: an image is known by what is in it.
    content = _content(entry.path)
    if content in file_kind.ACCEPTED:
        return _LINK if linked else _IMAGE
    return _OTHER if other or content in file_kind.OTHER_IMAGES else None


def _content(path: bytes) -> str:
    try:
        with open(path, "rb") as file:
            return file_kind.what_is(file.read(file_kind.HEAD))
    except OSError:
        return "not readable"


def _key(path: bytes) -> bytes:
    # So that order is by folder first, as in a walk: no name holds a zero byte, and none sorts before it.
    return path.replace(b"/", b"\0")


def _unmatched(row: bytes) -> Problem:
    name, image, _ = msgpack.unpackb(row)
    return Problem(name, "missing image", f"no such file: {image!r:.80}")


def _readable(path: bytes) -> str:
    # File names need not be UTF-8; what is stored and printed must be.
    return path.decode("utf-8", "replace")


def _shown(path: Path) -> str:
    return _readable(os.fsencode(path.name))


def _caption_file(path: Path, endings: tuple[str, ...]) -> Path | None:
    """The file beside an image that its captions are in: by ending first, then photo.txt before photo.png.txt."""
    for ending, whole in itertools.product(endings, (False, True)):
        for suffix in (ending, ending.upper()):
            file = path.with_name(path.name + suffix) if whole else path.with_suffix(suffix)
            if file.is_file():
                return file
    return None


def check_captions(name: str, texts: Mapping[str, list[str]]) -> Mapping[str, tuple[str, ...]] | Problem:
    """Captions as records may hold them, or what is wrong with those of the image of that name."""
    kept = {language: tuple(text.strip() for text in lines if _is_visible(text)) for language, lines in texts.items()}
    kept = {language: lines for language, lines in kept.items() if lines}
    if not kept:
        return Problem(name, "empty caption")
    if any(len(lines) > MAX_CAPTIONS or max(map(len, lines)) > MAX_TEXT for lines in kept.values()):
        return Problem(name, "bad caption", f"over {MAX_TEXT} characters, or over {MAX_CAPTIONS} captions a language")
    if len(kept) > MAX_LANGUAGES:
        return Problem(name, "bad caption", f"over {MAX_LANGUAGES} languages")
    if fault := next(filter(None, (text_fault(text) for lines in kept.values() for text in lines)), ""):
        return Problem(name, "bad caption", fault)
    return kept


def _is_visible(text: str) -> bool:
    # A byte-order mark or a zero-width space alone says nothing. NUL is for `text_fault` to name.
    return any(letter == "\0" or (letter.isprintable() and not letter.isspace()) for letter in text)
