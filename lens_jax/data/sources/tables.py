"""Rows of metadata.jsonl, .csv and .parquet: what each says of an image, or what is wrong with it.

A row is used as it is or refused: a caption is never cut, moved to another column or replaced by another one.
"""

import csv
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lens_jax.data.file_kind import HEAD, LFS_POINTER, what_is
from lens_jax.data.records import text_fault
from lens_jax.errors import LensError

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_COLUMNS = ("text", "caption", "captions")
# Of one row; it bounds what is in memory.
MAX_ROW = 16 << 20
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Columns:
    """Where a table has what is wanted."""

    # The image's path, from the table's folder.
    file: str = "file_name"
    # Its captions; by default whichever one of CAPTION_COLUMNS there is.
    caption: str = ""
    # Language of captions that name none.
    language: str = "en"


class Row(NamedTuple):
    """What a row says."""

    image: str
    # Captions by language.
    captions: dict[str, list[str]]


def rows(path: Path, columns: Columns) -> Iterator[tuple[int, Row | str]]:
    """(line, row or why it cannot be used) of a table; OSError where it cannot be read. A row is a few MB at most."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
        file.seek(0)
        if what_is(head) == LFS_POINTER:
            yield 1, f"the table is {LFS_POINTER}"
        elif path.suffix.lower() == ".parquet":
            yield from _parsed(_parquet_rows(file, columns), columns)
        elif head.startswith(_UTF16):
            yield 1, "the table is UTF-16; save it as UTF-8"
        else:
            read = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
            yield from _parsed(read(file, columns), columns)


def _parsed(found: Iterator[tuple[int, object]], columns: Columns) -> Iterator[tuple[int, Row | str]]:
    for line, values in found:
        try:
            yield line, _parse(values, columns)
        except ValueError as error:
            yield line, str(error)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | ValueError]]:
    """The lines of a file by number; what is too long is passed over."""
    for number in itertools.count(1):
        line = file.readline(MAX_ROW)
        if not line:
            return
        if len(line) == MAX_ROW and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_ROW)) and not rest.endswith(b"\n"):
                pass
            yield number, ValueError(f"over {MAX_ROW} bytes")
        else:
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _json_rows(file: BinaryIO, columns: Columns) -> Iterator[tuple[int, object]]:
    for number, line in _lines(file):
        if isinstance(line, ValueError):
            yield number, line
        elif line.strip():
            try:
                yield number, json.loads(line.decode("utf-8"), object_pairs_hook=_distinct)
            except UnicodeDecodeError:
                yield number, ValueError("not UTF-8")
            except (json.JSONDecodeError, RecursionError):
                yield number, ValueError("not JSON: one object a line is needed")
            except ValueError as error:
                yield number, error


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is there twice")
    return values


def _csv_rows(file: BinaryIO, columns: Columns) -> Iterator[tuple[int, object]]:
    # A line that is too long becomes a row of one cell, which no table has.
    texts = (
        str(line) if isinstance(line, ValueError) else line.decode("utf-8", "surrogateescape")
        for _, line in _lines(file)
    )
    # Strict: an open quote would take the rows that follow it for its text.
    reader, header = csv.reader(texts, strict=True), None
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, ValueError(f"not CSV: {error}; is a quote open?")
            if header is None:
                return
            continue
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            try:
                _caption_column(header, columns)
                if len(set(header)) < len(header):
                    raise ValueError("the header has a column twice")
            except ValueError as error:
                yield reader.line_num, ValueError(f"no row is used: {error}")
                return
        elif len(cells) != len(header):
            problem = f"{len(cells)} cells for {len(header)} columns; a text with commas needs quotes"
            yield reader.line_num, ValueError(problem)
        else:
            # An empty cell is an absent one, so that a table may leave `language` open.
            yield reader.line_num, dict(zip(header, cells))


def _parquet_rows(file: BinaryIO, columns: Columns) -> Iterator[tuple[int, object]]:
    """Rows count from 1, as lines do."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        yield 1, ValueError("reading parquet needs pyarrow: pip install 'lens-jax[data]'")
        return
    number = 0
    try:
        table = pq.ParquetFile(file, buffer_size=1 << 20)
        names = table.schema_arrow.names
        if len(set(names)) < len(names):
            raise ValueError("a column is there twice")
        wanted = [columns.file, _caption_column(names, columns)]
        wanted += ["language"] if "language" in names and "language" not in wanted else []
        for batch in table.iter_batches(64, columns=wanted, use_threads=False):
            for values in batch.to_pylist():
                number += 1
                yield number, {name: from_arrow(value) for name, value in values.items()}
    except (GeneratorExit, MemoryError):
        raise
    except Exception as error:  # pyarrow raises OSError, ValueError and others by the kind of damage
        yield number + 1, ValueError(f"no further row is used: {str(error).partition(chr(10))[0][:200]}")


def from_arrow(value: object) -> object:
    """A value that pyarrow gave as JSON would have it: maps come as pairs, and structs with the fields they lack."""
    if isinstance(value, list) and value and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        return dict(value)
    return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value


def _caption_column(present: Sequence[str] | Mapping, columns: Columns) -> str:
    """The column of captions among those present; ValueError where that, or the one of the file, is not clear."""
    has = ", ".join(present)[:100] or "nothing"
    if columns.file not in present:
        raise ValueError(f"no {columns.file}; it has {has}: say which with --file-column")
    if columns.caption:
        if columns.caption not in present:
            raise ValueError(f"no {columns.caption}; it has {has}: say which with --caption-column")
        return columns.caption
    found = [name for name in CAPTION_COLUMNS if name in present]
    if len(found) != 1:
        problem = f"both {' and '.join(found)}" if found else f"none of {', '.join(CAPTION_COLUMNS)}; it has {has}"
        raise ValueError(f"{problem}: say which with --caption-column")
    return found[0]


def _parse(values: object, columns: Columns) -> Row:
    """ValueError says what is wrong with a row."""
    if isinstance(values, ValueError):
        raise values
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    column = _caption_column(values, columns)
    image, given = values[columns.file], values[column]
    if not isinstance(image, str) or not 0 < len(image) <= 1000 or text_fault(image):
        raise ValueError(f"{columns.file} must be a text of 1 to 1000 characters")
    texts = given if isinstance(given, dict) else {values.get("language") or columns.language: given}
    texts = {key: [value] if isinstance(value, str) else value for key, value in texts.items()}
    for key, lines in texts.items():
        check_language(key)
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise ValueError(f"{column} must be a text, a list of texts, or map languages to them")
        if fault := next(filter(None, map(text_fault, lines)), ""):
            raise ValueError(f"{column} {fault}")
    return Row(image, texts)


def check_language(name: object) -> None:
    """ValueError unless records can hold captions in a language of that name."""
    if not isinstance(name, str) or text_fault(name) or not 0 < len(name) <= 32:
        raise ValueError("a language must be a text of 1 to 32 characters")


def check_columns(columns: Columns) -> None:
    """LensError where no table can have such columns."""
    try:
        check_language(columns.language)
    except ValueError as error:
        raise LensError(f"language {columns.language!r:.40}: {error}") from None
    if not columns.file or columns.file == columns.caption:
        raise LensError("file_column and caption_column must be different names")
