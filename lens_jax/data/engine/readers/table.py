"""Tables of addresses and alt text, with the images that img2dataset downloaded for them.

That is `00000.parquet`, and beside it `00000.tar` or a folder `00000`. Rows and images are joined by `key`; what was
not downloaded is a problem with the reason that the table gives.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from lens_jax.data.engine.config import Source
from lens_jax.data.engine.readers import files, rows, samples
from lens_jax.data.engine.readers.item import SHA256, Item, Problem, make_item, texts_of
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError

COLUMNS = {
    "key": "what an image's file is called, without its ending; by default `key`",
    "text": f"captions; by default whichever there is of {', '.join(rows.TEXTS)}",
    "url": "addresses",
    "licence": "licences",
    "language": "the language of each row's captions",
    "status": "whether it was downloaded: `success`, or why not",
    **SHA256,
}

# Reads the image of a key.
Images = Mapping[str, Callable[[], bytes | Problem]]


def units(source: Source, unit_rows: int) -> list[Unit]:
    """Runs of rows of the tables of a source; LensError where there are none."""
    files.check_columns(source, COLUMNS)
    root = files.root_of(source)
    return [
        unit
        for name in files.find(source, (".parquet",))
        for unit in files.split(source, name, rows.count(root / name), unit_rows)
    ]


def read(source: Source, unit: Unit) -> Iterator[Item | Problem]:
    """The images of a unit's rows. With the last unit of a table, what its tar or folder has beyond its rows."""
    path, columns = files.root_of(source) / unit.path, {}

    def choose(schema) -> list[str]:
        columns.update(_columns(source, list(schema.names)))
        return [name for name in columns.values() if name]

    with ExitStack() as stack:
        try:
            found = rows.read_rows(path, unit, choose)
            first = next(found, None)
            if first is None:
                return
            keys = [_key(value) for value in rows.read_column(path, columns["key"])]
            images, problems = _images(path, unit.path, stack)
        except (LensError, OSError) as error:
            yield Problem(unit.path, "bad table", str(getattr(error, "strerror", None) or error))
            return
        earlier: set[str] = set(keys[: first[0]])
        while first is not None:
            number, values = first
            yield _make(source, unit.path, number, values, columns, images, earlier)
            first = next(found, None)
        if unit.part == unit.parts - 1:
            yield from problems
            stem = os.path.splitext(unit.path)[0]
            for key in sorted(images.keys() - set(keys)):
                yield Problem(files.readable(f"{stem}/{key}"), "no row", "its key is not in the table")


def _columns(source: Source, names: list[str]) -> dict[str, str]:
    wanted = lambda what, usual: rows.find_column(names, source.columns.get(what, ""), usual, what)
    found = {
        "key": wanted("key", ("key",)),
        "text": wanted("text", rows.TEXTS),
        "url": wanted("url", rows.URLS),
        "licence": wanted("licence", rows.LICENCES),
        "language": wanted("language", ("language",)),
        "status": wanted("status", ("status",)),
        "error": wanted("", ("error_message",)),
        "sha256": wanted("sha256", ()),
    }
    if not found["key"]:
        raise LensError(f"no column key; it has {', '.join(names)[:200]}: say which by columns key")
    return found


def _make(
    source: Source, table: str, number: int, values: Mapping | str, columns: dict, images: Images, earlier: set[str]
) -> Item | Problem:
    place = f"{os.path.splitext(table)[0]}/row {number}"
    if isinstance(values, str):
        return Problem(place, "corrupt data", values)
    get = lambda what: values.get(columns[what])
    key = _key(get("key"))
    if not key:
        return Problem(place, "bad row", "no key")
    if key in earlier:
        return Problem(place, "duplicate key", f"{key:.80} is there before")
    earlier.add(key)
    place = files.readable(f"{os.path.splitext(table)[0]}/{key}")
    if columns["status"] and get("status") != "success":
        return Problem(place, "not downloaded", f"{get('status')}: {get('error') or 'no reason given'}"[:200])
    if key not in images:
        return Problem(place, "missing image", "no file of this key")
    data = images[key]()
    if isinstance(data, Problem):
        return Problem(place, data.reason, data.detail)
    texts = texts_of(place, get("text"), get("language"))
    return make_item(source, place, data, texts, get("url"), get("licence"), get("sha256"))


def _key(value: object) -> str:
    """A key as a text of at most 1000 characters; empty for what is none."""
    text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    return text if len(text) <= 1000 else ""


def _images(table: Path, name: str, stack: ExitStack) -> tuple[Images, list[Problem]]:
    """The images beside a table, by key, and what is wrong with their tar. LensError where there is neither."""
    tar, folder = table.with_suffix(".tar"), table.with_suffix("")
    if tar.is_file():
        file = stack.enter_context(tar.open("rb"))
        contents = samples.contents(file, os.path.splitext(name)[0] + ".tar")
        # As the names of its files have it, also where its tar has folders.
        of = lambda sample: lambda: _read_sample(file, sample)
        found = {key.rpartition("/")[2]: of(sample) for key, sample in contents.samples.items()}
        return found, [problem for _, problem in contents.problems]
    if folder.is_dir():
        names = [entry.name for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
        stems = {name: os.path.splitext(name) for name in sorted(names) if not name.startswith(".")}
        of = lambda name: lambda: _read(folder / name)
        return {stem: of(name) for name, (stem, ending) in stems.items() if ending.lower() in samples.IMAGES}, []
    raise LensError(f"no images: neither {tar.name} nor the folder {folder.name} lies beside it")


def _read_sample(file: BinaryIO, sample: samples.Sample) -> bytes | Problem:
    try:
        return samples.image(file, sample)
    except OSError as error:
        return Problem("", "cannot be read", str(error.strerror))


def _read(path: Path) -> bytes | Problem:
    try:
        return files.read_whole(path)
    except OSError as error:
        return Problem("", "cannot be read", str(error.strerror))
