"""Parquet files with a column of images: bytes, or Hugging Face's {bytes, path}."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from lens_jax.data.engine.config import Source
from lens_jax.data.engine.readers import files, rows
from lens_jax.data.engine.readers.item import SHA256, Item, Problem, make_item, texts_of
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError

ENDINGS = (".parquet",)
COLUMNS = {
    "image": "the images; by default `image`, or else the only column of bytes",
    "text": f"captions; by default whichever there is of {', '.join(rows.TEXTS)}",
    "url": "addresses",
    "licence": "licences",
    "language": "the language of each row's captions",
    "meta": "names of columns, with spaces between them, that are kept in the records' meta; by default none",
    **SHA256,
}
# Before the names of columns that are kept as they are.
_META = "meta "


def units(source: Source, unit_rows: int) -> list[Unit]:
    """Runs of rows of the files of a source; LensError where there are none."""
    files.check_columns(source, COLUMNS)
    root = files.root_of(source)
    return [
        unit
        for name in files.find(source, ENDINGS)
        for unit in files.split(source, name, rows.count(root / name), unit_rows)
    ]


def read(source: Source, unit: Unit) -> Iterator[Item | Problem]:
    """The images of a unit's rows. A file that cannot be used as a whole is one problem."""
    root = files.root_of(source)
    columns: dict[str, str] = {}

    def choose(schema) -> list[str]:
        columns.update(_columns(source, schema))
        return [name for name in columns.values() if name]

    try:
        for number, values in rows.read_rows(root / unit.path, unit, choose):
            key = f"{unit.path}/{number:08d}"
            if isinstance(values, str):
                yield Problem(key, "corrupt data", values)
            else:
                yield _make(source, root, unit.path, key, {what: values.get(name) for what, name in columns.items()})
    except LensError as error:
        yield Problem(unit.path, "bad table", str(error))


def _columns(source: Source, schema) -> dict[str, str]:
    """The column of each thing, empty where there is none; LensError where there are no images."""
    import pyarrow as pa

    names = list(schema.names)
    if len(set(names)) < len(names):
        raise LensError("two columns have the same name")
    image = source.columns.get("image") or ("image" if "image" in names else "")
    if image not in names:
        found = [] if image else [name for name in names if _holds_images(pa, schema.field(name).type)]
        if len(found) != 1:
            what = f"no column {image}" if image else f"{'several' if found else 'no'} columns of bytes"
            raise LensError(f"{what}; it has {', '.join(names)[:200]}: say which by columns image")
        image = found[0]
    if not _holds_images(pa, schema.field(image).type):
        raise LensError(f"column {image} is of type {schema.field(image).type!s:.80}, not bytes or {{bytes, path}}")
    wanted = lambda what, usual: rows.find_column(names, source.columns.get(what, ""), usual, what)
    wanted_meta = lambda name: rows.find_column(names, name, (), "meta")
    return {
        "image": image,
        "text": wanted("text", rows.TEXTS),
        "url": wanted("url", rows.URLS),
        "licence": wanted("licence", rows.LICENCES),
        "language": wanted("language", ("language",)),
        "sha256": wanted("sha256", ()),
        **{_META + name: wanted_meta(name) for name in source.columns.get("meta", "").split()},
    }


def _holds_images(pa, kind) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(pa, kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _make(source: Source, root: Path, table: str, key: str, values: Mapping) -> Item | Problem:
    image = values["image"]
    if isinstance(image, dict):
        image = image.get("bytes") or _named(root, table, key, image.get("path"))
    if isinstance(image, Problem):
        return image
    if not isinstance(image, bytes):
        return Problem(key, "no image", "null")
    texts = texts_of(key, values["text"], values["language"])
    item = make_item(source, key, image, texts, values["url"], values["licence"], values["sha256"])
    meta = {what[len(_META) :]: value for what, value in values.items() if what.startswith(_META) and value is not None}
    return dataclasses.replace(item, meta=meta) if meta and isinstance(item, Item) else item


def _named(root: Path, table: str, key: str, path: object) -> bytes | Problem | None:
    """The file that a row names in place of bytes, in the folder of the table or the source's."""
    if not isinstance(path, str) or not path:
        return None
    if "\0" in path:
        return Problem(key, "missing image", f"no such file: {path!r:.80}")
    for folder in dict.fromkeys(((root / table).parent, root)):
        inside = Path(os.path.normpath(folder / path))
        if os.path.isabs(path) or not inside.resolve().is_relative_to(root.resolve()):
            return Problem(key, "outside the folder", f"{path!r:.80}")
        try:
            return files.read_whole(inside)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            return Problem(key, "cannot be read", f"{path!r:.80}: {getattr(error, 'strerror', error)}")
    return Problem(key, "missing image", f"no such file: {path!r:.80}")
