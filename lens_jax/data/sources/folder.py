"""Captioned pictures in a folder of your own.

A picture's captions stand in a `.txt` of the same name beside it, one a line, or in a `metadata.jsonl` or
`metadata.csv` in its folder or one above, with the columns `file_name`, one of `text`, `caption` or `captions`, and
optionally `language`. In JSON `captions` may also be a list, or map languages to a text or a list.

Whatever cannot be used comes out as a Problem in place of an example: nothing is skipped silently.
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lens_jax.data.records import MAX_CAPTIONS, MAX_TEXT
from lens_jax.errors import LensError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Pictures too, so leaving them out is worth a line in the report.
OTHER_SUFFIXES = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jxl")
CAPTION_KEYS = ("text", "caption", "captions")
MAX_TEXT_FILE = 1 << 20


@dataclass(frozen=True)
class Captioned:
    """A picture file and its captions."""

    # Path inside the folder, with forward slashes.
    name: str
    path: Path
    captions: Mapping[str, tuple[str, ...]]


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


def scan(folder: str | os.PathLike, language: str) -> Iterator[Captioned | Problem]:
    """Every picture below `folder` with its captions, and every problem, in a fixed order.

    `language` is that of captions that name none. Pictures are not opened here. LensError when there is no folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise LensError(f"{root}: no such folder")
    root = root.resolve()
    files = sorted(_walk(root))
    captions: dict[Path, dict[str, list[str]]] = {}
    for path in files:
        if path.name in ("metadata.jsonl", "metadata.csv"):
            yield from _read_metadata(path, root, language, captions)
    for path in files:
        suffix, name = path.suffix.lower(), _readable(path.relative_to(root))
        if suffix in OTHER_SUFFIXES:
            yield Problem(name, "format not accepted", f"accepted: {', '.join(SUFFIXES)}")
        elif suffix in SUFFIXES:
            if not path.resolve().is_relative_to(root):
                yield Problem(name, "outside the folder", "a link that leads out of it")
            elif path in captions:
                yield _captioned(name, path, captions[path])
            else:
                yield _beside(name, path, language)


def _walk(root: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(root):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _readable(path: Path) -> str:
    # File names need not be UTF-8; what is stored and printed must be.
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


def _captioned(name: str, path: Path, texts: Mapping[str, list[str]]) -> Captioned | Problem:
    kept = {language: tuple(text.strip() for text in lines if text.strip()) for language, lines in texts.items()}
    kept = {language: lines for language, lines in kept.items() if lines}
    if not kept:
        return Problem(name, "empty caption")
    if any(len(lines) > MAX_CAPTIONS or max(map(len, lines)) > MAX_TEXT for lines in kept.values()):
        return Problem(name, "bad caption", f"over {MAX_TEXT} characters, or over {MAX_CAPTIONS} captions a language")
    return Captioned(name, path, kept)


def _beside(name: str, path: Path, language: str) -> Captioned | Problem:
    text = path.with_suffix(".txt")
    if not text.is_file():
        return Problem(name, "no caption", "neither a .txt beside it nor a row in metadata.jsonl or metadata.csv")
    try:
        if text.stat().st_size > MAX_TEXT_FILE:
            return Problem(name, "bad caption", f"{text.name} is over {MAX_TEXT_FILE} bytes")
        return _captioned(name, path, {language: text.read_text(encoding="utf-8-sig").splitlines()})
    except (OSError, UnicodeDecodeError) as error:
        return Problem(name, "bad caption", f"{text.name} cannot be read as UTF-8: {type(error).__name__}")


def _read_metadata(
    path: Path, root: Path, language: str, captions: dict[Path, dict[str, list[str]]]
) -> Iterator[Problem]:
    """Adds the captions of one metadata file to `captions`; yields the rows that cannot be used."""
    where = _readable(path.relative_to(root))
    rows = _json_rows(path) if path.suffix == ".jsonl" else _csv_rows(path)
    try:
        for line, row in rows:
            name = f"{where}:{line}"
            try:
                image, texts = _parse_row(row, language)
            except ValueError as error:
                yield Problem(name, "bad row", str(error))
                continue
            target = Path(os.path.normpath(path.parent / image))
            if Path(image).is_absolute() or not target.resolve().is_relative_to(root):
                yield Problem(name, "outside the folder", f"file_name {image!r:.80}")
            elif not os.path.isfile(target):  # unlike Path.is_file, False for a name that is too long
                yield Problem(name, "missing image", f"file_name {image!r:.80}")
            else:
                known = captions.setdefault(target, {})
                for key, lines in texts.items():
                    known.setdefault(key, []).extend(lines)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        yield Problem(where, "bad row", f"reading stopped: {type(error).__name__}: {error}"[:160])


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
            # An empty cell is an absent one, so that a table may leave `language` open.
            yield reader.line_num, {key: value for key, value in row.items() if key and value is not None}


def _parse_row(row: object, language: str) -> tuple[str, dict[str, list[str]]]:
    """(file name, captions by language) of one row; ValueError says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
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
