"""The files of a source: which there are, and which run of what is in them belongs to a unit."""

import glob
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from lens_jax.data import file_kind
from lens_jax.data.engine.config import Source
from lens_jax.data.engine.unit import Unit, make_unit
from lens_jax.data.images import MAX_ENCODED_BYTES
from lens_jax.data.records import text_fault
from lens_jax.errors import LensError, nearest

# A source may have many units, but what a file says of itself must not make more than a run could ever list.
MAX_PARTS = 1 << 16


def find(source: Source, endings: tuple[str, ...]) -> list[str]:
    """Names below `root_of` of the files that end so, in order of their paths; LensError where there are none.

    Links to files are followed, as a hub's cache consists of them; links to folders are not. Names with a dot in front
    are passed over.
    """
    path, root = Path(source.path), root_of(source)
    if path.is_file():
        names = [path.name]
    elif path.is_dir():
        names = [name for name in _walk(root) if name.lower().endswith(endings)]
    else:
        found = filter(os.path.isfile, glob.glob(source.path, recursive=True))
        names = [os.path.relpath(name, root).replace(os.sep, "/") for name in found]
    if not names:
        there = "no such file or folder" if not path.exists() else "there are none in it"
        raise LensError(f"source {source.name}: {source.path}: {there}; {source.kind} reads {', '.join(endings)}")
    for name in names:
        if text_fault(name):
            raise LensError(f"source {source.name}: {name!r:.80}: the name is not UTF-8; rename the file")
    return sorted(names, key=lambda name: name.replace("/", "\0"))


def root_of(source: Source) -> Path:
    """The folder that names of files are relative to: the source's, or of a pattern the part without wildcards."""
    path = Path(source.path)
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    parts = path.parts[:-1]
    fixed = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:fixed])


def _walk(root: Path) -> Iterable[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.isfile(os.path.join(folder, name)):
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def split(source: Source, path: str, count: int, unit_rows: int) -> list[Unit]:
    """Units for `count` rows of a file, at least one, none of more than `unit_rows` rows."""
    parts = min(max(1, -(-count // unit_rows)), MAX_PARTS)
    return [make_unit(source.name, path, part, parts) for part in range(parts)]


def span(unit: Unit, count: int) -> range:
    """Which of `count` rows a unit has."""
    return range(unit.part * count // unit.parts, (unit.part + 1) * count // unit.parts)


def check_columns(source: Source, accepted: Mapping[str, str]) -> None:
    """LensError for columns that a source of this kind has no use for."""
    for name in source.columns:
        if name not in accepted:
            known = ", ".join(accepted) or "none"
            raise LensError(f"source {source.name}: columns has {name!r}; accepted: {known}{nearest(name, accepted)}")


def read_whole(path: str | os.PathLike) -> bytes:
    """The bytes of an image file, or one more than may be: never more, whatever the file system says of its size."""
    with open(path, "rb") as file:
        return file.read(MAX_ENCODED_BYTES + 1)


def kind_of(path: str | os.PathLike) -> str:
    """What a file is by its first bytes."""
    with open(path, "rb") as file:
        return file_kind.what_is(file.read(file_kind.HEAD))


def readable(name: bytes | str) -> str:
    """A name as text that can be stored; different names stay different."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
