"""Reading sources: every kind gives units of work and the items of each. Nothing is downloaded.

The order of units, and that of the items of a unit, depend on the source alone; so an image has the same place in every
process. How a source is cut into units changes neither its items nor their keys.
"""

from collections.abc import Iterator

from lens_jax.data.engine.config import Source
from lens_jax.data.engine.readers import folder, lens, parquet, table, tfds, webdataset
from lens_jax.data.engine.readers.item import Item, Problem
from lens_jax.data.engine.unit import Unit

__all__ = ["Item", "Problem", "read", "units"]

_KINDS = {
    "folder": folder,
    "imagefolder": folder,
    "webdataset": webdataset,
    "parquet": parquet,
    "table": table,
    "tfds": tfds,
    "lens": lens,
}


def units(source: Source, unit_rows: int) -> list[Unit]:
    """The units of a source, in order, each of about `unit_rows` images. LensError where there is nothing to read."""
    return _KINDS[source.kind].units(source, unit_rows)


def read(source: Source, unit: Unit) -> Iterator[Item | Problem]:
    """The items of a unit, read as they are asked for. What cannot be used is a Problem in its place."""
    return _KINDS[source.kind].read(source, unit)
