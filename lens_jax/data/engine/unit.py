"""A unit of work: what one worker does at once, and what a result is named by."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """A run of images of one source. Units of a run have a fixed order: by source, path and part."""

    # "<source>-<10 hexadecimal digits>", unique in a run and safe as a file name.
    id: str
    # Name of its source.
    source: str
    # What it is of: a folder, a tar, a parquet file.
    path: str
    # Which run of rows, row group or files of the path, from 0, of how many.
    part: int
    parts: int


def make_unit(source: str, path: str, part: int, parts: int) -> Unit:
    """A unit with its id, which follows from source, path and part alone."""
    name = "\0".join((source, path, str(part)))
    # A path that is not valid Unicode has surrogates in it, as os.listdir gives them.
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=5).hexdigest()
    return Unit(f"{source}-{digest}", source, path, part, parts)
