"""WebDataset: uncompressed tars, in which the files of one sample share a name.

A tar is one unit, unless it is far larger than usual: then a unit has the samples that begin in its share of the bytes.
Each unit looks at all headers before, which costs a seek a file, so that tars need not be opened to plan a run.
"""

import heapq
from collections.abc import Iterator

from lens_jax.data.engine.config import Source
from lens_jax.data.engine.readers import files, samples
from lens_jax.data.engine.readers.item import Item, Problem
from lens_jax.data.engine.unit import Unit

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
# For planning alone: a photograph of one megapixel has about twice this.
_BYTES = 128 << 10


def units(source: Source, unit_rows: int) -> list[Unit]:
    """The tars of a source, large ones in parts; LensError where there are none."""
    files.check_columns(source, samples.COLUMNS)
    found, root = [], files.root_of(source)
    for name in files.find(source, ENDINGS):
        found += files.split(source, name, (root / name).stat().st_size // _BYTES, unit_rows)
    return found


def read(source: Source, unit: Unit) -> Iterator[Item | Problem]:
    """The samples that begin in a unit's share of its tar, by place, and what is wrong there."""
    try:
        with open(files.root_of(source) / unit.path, "rb") as file:
            size = file.seek(0, 2)
            contents = samples.contents(file, unit.path)
            share = files.span(unit, size)
            last = unit.part == unit.parts - 1
            inside = lambda start: start in share or (last and start >= share.stop)
            found = heapq.merge(
                ((sample.start, 0, sample) for sample in contents.samples.values()),
                ((start, 1, problem) for start, problem in contents.problems),
                key=lambda entry: entry[:2],
            )
            for start, _, entry in found:
                if not inside(start):
                    continue
                if isinstance(entry, Problem):
                    yield entry
                else:
                    yield _made(source, file, entry)
    except OSError as error:
        yield Problem(unit.path, "cannot be read", str(error.strerror))


def _made(source: Source, file, sample: samples.Sample) -> Item | Problem:
    try:
        return samples.make(source, file, sample)
    except OSError as error:
        return Problem(sample.key, "cannot be read", str(error.strerror))
