"""A data set that is written already, such as to filter it anew."""

from collections.abc import Iterator

from lens_jax.data.engine.config import Source
from lens_jax.data.engine.readers import files
from lens_jax.data.engine.readers.item import Item, Problem, make_item
from lens_jax.data.engine.unit import Unit
from lens_jax.data.index import Index, load_index
from lens_jax.data.reader import RecordReader
from lens_jax.errors import LensError

# Records read at a time.
_BATCH = 16


def units(source: Source, unit_rows: int) -> list[Unit]:
    """Runs of the records of each stream; LensError where there is no data set of images."""
    return [
        unit for stream in _load(source).streams for unit in files.split(source, stream.name, stream.records, unit_rows)
    ]


def read(source: Source, unit: Unit) -> Iterator[Item | Problem]:
    """The records of a unit. Their splits are not kept: which side an image is on is decided by what is in it."""
    index = _load(source)
    stream = next((stream for stream in index.streams if stream.name == unit.path), None)
    if stream is None:
        raise LensError(f"source {source.name}: {source.path} has no {unit.path} any more; choose another work folder")
    reader, rows = RecordReader(index), files.span(unit, stream.records)
    try:
        for start in range(rows.start, rows.stop, _BATCH):
            numbers = range(start, min(start + _BATCH, rows.stop))
            for number, record in zip(numbers, _read(reader, stream, numbers)):
                key = f"{unit.path}/{number:08d}"
                if isinstance(record, str):
                    yield Problem(key, "corrupt data", record)
                    continue
                texts = {language: list(lines) for language, lines in record.captions.items()}
                yield make_item(source, key, record.image, texts, record.meta.get("url"), record.licence)
    finally:
        reader.close()


def _read(reader: RecordReader, stream, numbers: range) -> list:
    """Records, or why one cannot be read: by one where not all can, so that each is counted."""
    try:
        return reader.read(stream, numbers)
    except LensError as error:
        if len(numbers) == 1:
            return [str(error)]
        return [found for number in numbers for found in _read(reader, stream, range(number, number + 1))]


def _load(source: Source) -> Index:
    files.check_columns(source, {})
    index = load_index(source.path)
    if index.features is not None:
        raise LensError(f"source {source.name}: {source.path} holds features; name the data set of images")
    return index
