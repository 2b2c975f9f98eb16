"""Rows of parquet files: which column holds what, and the rows of a unit without reading a file whole."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lens_jax.data.engine.readers.files import kind_of
from lens_jax.data.engine.unit import Unit
from lens_jax.data.sources.tables import from_arrow
from lens_jax.errors import LensError

TEXTS = ("text", "caption", "captions", "alt_text")
URLS = ("url", "image_url")
LICENCES = ("licence", "license")
# Rows decoded at a time: an image may have 64 MiB.
_BATCH = 16
_BUFFER = 1 << 20


def count(path: Path) -> int:
    """Rows of a file by its footer; 0 where it has none that can be read, which reading will say.

    A footer may claim any number: what could not lie in the file's bytes counts as 0 too.
    """
    try:
        found, size = _open(path).metadata.num_rows, path.stat().st_size
    except LensError:
        return 0
    # An image takes some bytes, and a row of a table of addresses too.
    return found if 0 <= found <= size else 0


def find_column(names: Sequence[str], wanted: str, usual: Sequence[str], what: str) -> str:
    """The column that holds `what`: the wanted one, or the only one of the usual names, whatever their capitals.

    Empty where none is wanted and none there. LensError where that is not clear.
    """
    if wanted:
        if wanted not in names:
            raise LensError(f"no column {wanted} for the {what}; it has {', '.join(names)[:200]}")
        return wanted
    found = [name for name in names if name.lower() in usual]
    if len(found) > 1:
        raise LensError(f"{' and '.join(found)} may be the {what}; say which by columns")
    return found[0] if found else ""


def read_rows(
    path: Path, unit: Unit, columns: Callable[[object], Sequence[str]]
) -> Iterator[tuple[int, Mapping | str]]:
    """(number, values by column, or why they cannot be read) of each of a unit's rows.

    `columns` says of a file's schema which columns to read. LensError where the file cannot be opened, and what
    `columns` raises.
    """
    file = _open(path)
    names = list(dict.fromkeys(columns(file.schema_arrow)))
    rows = _span(unit, file.metadata)
    start = 0
    for group in range(file.metadata.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        if stop > rows.start and start < rows.stop:
            yield from _read_group(file, group, names, range(start, stop), rows)
        start = stop


def read_column(path: Path, name: str) -> list:
    """All values of one column; LensError where they cannot be read."""
    try:
        return _open(path).read(columns=[name], use_threads=False)[name].to_pylist()
    except LensError:
        raise
    except Exception as error:  # pyarrow raises OSError, ValueError and others by the kind of damage
        raise LensError(_reason(error)) from error


def _open(path: Path):
    import pyarrow.parquet as pq

    try:
        # Or a whole column of a row group is fetched at once.
        return pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    except Exception as error:  # as above
        try:
            kind = kind_of(path)
        except OSError as reason:
            raise LensError(f"cannot be read: {reason.strerror}") from error
        raise LensError(_reason(error) if kind == "Parquet" else f"the file is {kind}, not Parquet") from error


def _span(unit: Unit, metadata) -> range:
    """The unit's rows, between borders of row groups where such a border is near: each group is then read once."""
    total, starts = metadata.num_rows, [0]
    for group in range(metadata.num_row_groups):
        starts.append(starts[-1] + metadata.row_group(group).num_rows)

    def border(number: int) -> int:
        even = number * total // unit.parts
        if number in (0, unit.parts):
            return even
        nearest = min(starts, key=lambda start: (abs(start - even), start))
        # Less than half a unit away, so that borders keep their order.
        return nearest if 2 * abs(nearest - even) * unit.parts < total - 2 * unit.parts else even

    return range(border(unit.part), border(unit.part + 1))


def _read_group(file, group: int, names: list[str], held: range, wanted: range) -> Iterator[tuple[int, Mapping | str]]:
    row, reason = held.start, ""
    try:
        for batch in file.iter_batches(_BATCH, row_groups=[group], columns=names, use_threads=False):
            for number in range(batch.num_rows):
                if row in wanted:
                    yield row, {name: from_arrow(batch.column(name)[number].as_py()) for name in names}
                row += 1
            if row >= wanted.stop:
                return
    except (GeneratorExit, MemoryError):
        raise
    except Exception as error:  # as above; texts that are not UTF-8 too
        reason = _reason(error)
    for number in range(max(row, wanted.start), min(held.stop, wanted.stop)):
        yield number, reason or f"the row group ends before row {held.stop}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200]
