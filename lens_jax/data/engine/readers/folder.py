"""Images in a folder, with captions in files beside them or in metadata.jsonl, .csv or .parquet: Hugging Face's
imagefolder too. See `data/sources/folder.py`, which `lens-jax prepare folder` reads by as well.

A folder has no parts that a worker could find without looking through all of it. So each process looks once, and keeps
what it found in a file without a name: eight bytes an image in memory.
"""

import itertools
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np

from lens_jax.atomic import writing
from lens_jax.data.engine.config import Source
from lens_jax.data.engine.readers import files
from lens_jax.data.engine.readers.item import Item, Problem, make_item
from lens_jax.data.engine.unit import Unit
from lens_jax.data.sources import folder, tables
from lens_jax.errors import LensError

COLUMNS = {"file": "column of a table with the image's path", "text": "column of a table with its captions"}


def units(source: Source, unit_rows: int) -> list[Unit]:
    """Runs of the images in the order of their paths; LensError where there is no folder, or nothing in it."""
    files.check_columns(source, COLUMNS)
    count = len(_listing(source, anew=True))
    if not count:
        accepted = ", ".join(folder.SUFFIXES)
        raise LensError(f"source {source.name}: {source.path}: no images in it; accepted are {accepted}")
    return files.split(source, ".", count, unit_rows)


def read(source: Source, unit: Unit) -> Iterator[Item | Problem]:
    """The images of a unit, and whatever else in the folder cannot be used."""
    listing = _listing(source)
    for number in files.span(unit, len(listing)):
        found = listing[number]
        if isinstance(found, Problem):
            yield found
            continue
        key = files.readable(found.name)
        try:
            data = files.read_whole(found.path)
        except OSError as error:
            yield Problem(key, "cannot be read", str(error.strerror))
            continue
        texts = listing.scan.captions_of(found)
        if isinstance(texts, folder.Problem):
            texts = Problem(key, texts.reason, texts.detail)
        yield make_item(source, key, data, texts)


class _Listing:
    """All that is in a folder, in order, on disk. Safe to share between threads, and with a process that is forked."""

    def __init__(self, source: Source):
        columns = tables.Columns(source.columns.get("file", "file_name"), source.columns.get("text", ""))
        tables.check_columns(columns)
        root = folder.root_of(source.path)
        self._root = os.fsencode(root)
        self._file = tempfile.TemporaryFile(prefix="lens-jax-listing-")  # noqa: SIM115  (as long as the process)
        offsets = [0]
        place = tempfile.gettempdir()
        with writing(place), tempfile.TemporaryDirectory(prefix="lens-jax-listing-", dir=place) as work:
            self.scan = folder.Scan(root, Path(work), folder.Options(columns))
            for item in itertools.chain(self.scan.look(), self.scan.items()):
                if item is not None:
                    offsets.append(offsets[-1] + self._file.write(msgpack.packb(self._plain(item))))
            self._file.flush()
        self._offsets = np.array(offsets, np.int64)

    def _plain(self, item: folder.Found | folder.Problem) -> list:
        if isinstance(item, folder.Problem):
            return [item.name.encode("utf-8", "replace"), item.reason, item.detail.encode("utf-8", "replace")]
        return [os.path.relpath(os.fsencode(item.path), self._root), item.captions]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> folder.Found | Problem:
        start, end = map(int, self._offsets[number : number + 2])
        name, *rest = msgpack.unpackb(os.pread(self._file.fileno(), end - start, start))
        if len(rest) == 2:
            return Problem(files.readable(name), rest[0], rest[1].decode())
        return folder.Found(os.fsdecode(name), Path(os.fsdecode(os.path.join(self._root, name))), rest[0])


_listings: dict[tuple, _Listing] = {}
_lock = threading.Lock()


def _listing(source: Source, anew: bool = False) -> _Listing:
    key = source.path, *sorted(source.columns.items())
    with _lock:
        if anew or key not in _listings:
            _listings[key] = _Listing(source)
        return _listings[key]
