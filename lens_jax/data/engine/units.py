"""Which units a run has, and whether they are what they were when their tables were made."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from lens_jax.data.engine import attempts
from lens_jax.data.engine.config import EngineConfig, Source
from lens_jax.data.engine.layout import names
from lens_jax.data.engine.tables import read_table, write_table
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError

SCHEMA = pa.schema(
    [
        ("unit", pa.string()),
        ("source", pa.string()),
        ("path", pa.string()),
        ("part", pa.int32()),
        ("parts", pa.int32()),
        ("stamp", pa.string()),
    ]
)


def find_units(config: EngineConfig) -> list[Unit]:
    """The units of a run in their fixed order, also written to work/units.parquet. Reads no image.

    Where a source is not what it was, by the size and time of its files or by how it is to be read, what was computed
    of the units concerned is removed.
    """
    from lens_jax.data.engine import readers

    stamped = []
    for source in config.sources:
        stamps: dict[str, str] = {}
        for unit in readers.units(source, config.unit_rows):
            if unit.path not in stamps:
                stamps[unit.path] = _stamp(source, unit.path, config.unit_rows)
            stamped.append((unit, f"{stamps[unit.path]}-{unit.parts}"))
    stamped.sort(key=lambda pair: (pair[0].source, pair[0].path, pair[0].part))
    path = Path(config.work) / "units.parquet"
    before = _stamps(path)
    changed = {unit.id for unit, stamp in stamped if before.get(unit.id, stamp) != stamp}
    if changed:
        _forget(Path(config.work), changed)
    if before != {unit.id: stamp for unit, stamp in stamped}:
        save_units(path, stamped)
    return [unit for unit, _ in stamped]


def save_units(path: Path, stamped: Sequence[tuple[Unit, str]]) -> None:
    """Write units with their stamps as a table."""
    rows = [asdict(unit) | {"unit": unit.id, "stamp": stamp} for unit, stamp in stamped]
    write_table(path, pa.Table.from_pylist(rows, SCHEMA))


def read_units(work: str | os.PathLike, name: str = "units") -> list[Unit]:
    """The units that a run had when it was last started, or its `groups`; LensError where it never was."""
    path = Path(work) / f"{name}.parquet"
    if not path.is_file():
        raise LensError(f"{path}: no run of the data engine there yet; start one with `lens-jax data build CONFIG`")
    table = read_table(path)
    if table.schema.names != SCHEMA.names:
        raise LensError(f"{path}: not a list of units; remove it")
    return [Unit(r["unit"], r["source"], r["path"], r["part"], r["parts"]) for r in table.to_pylist()]


def group_of(work: str | os.PathLike, unit: str) -> str | None:
    """The id of the group that a unit was last written in; None where it was not."""
    path = Path(work) / "groups.parquet"
    found = read_table(path, ["unit", "stamp"]).to_pylist() if path.is_file() else []
    return next((row["unit"] for row in found if unit in (row["stamp"] or "").split()), None)


def digest(work: str | os.PathLike, units: Sequence[Unit]) -> str:
    """Names a set of units and what is in them: what is made of all of them together follows from no less."""
    stamps = _stamps(Path(work) / "units.parquet")
    text = "\n".join(f"{unit.id} {stamps.get(unit.id)}" for unit in units)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _stamps(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    table = read_table(path)
    if table.schema.names != SCHEMA.names:
        return {}
    return dict(zip(table["unit"].to_pylist(), table["stamp"].to_pylist()))


def _stamp(source: Source, path: str, unit_rows: int) -> str:
    """Changes when the file or folder does, and when its source is to be read otherwise."""
    from lens_jax.data.engine.readers.files import root_of

    digest = hashlib.blake2b(digest_size=8)
    how = [source.kind, sorted(source.columns.items()), source.licence, source.caption == "keep", unit_rows]
    digest.update(json.dumps(how).encode())
    target = root_of(source) / path
    if not target.exists():  # a split, which is of all files there
        target = root_of(source)
    targets = [target]
    if source.kind == "table":  # its images lie beside it
        targets += [place for place in (target.with_suffix(".tar"), target.with_suffix("")) if place.exists()]
    for place in targets:
        for name, size, changed in sorted(_files(place)):
            digest.update(f"{name}\0{size}\0{changed}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _files(target: Path):
    """(name, bytes, time) of a file, or of every file below a folder."""
    folders = [""]
    if not target.is_dir():
        try:
            found = target.stat()
        except OSError as error:
            raise LensError(f"{target}: {error.strerror}") from None
        yield "", found.st_size, found.st_mtime_ns
        return
    while folders:
        inside = folders.pop()
        with os.scandir(target / inside) as entries:
            for entry in entries:
                name = f"{inside}/{entry.name}" if inside else entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif entry.is_file():
                    found = entry.stat()
                    yield name, found.st_size, found.st_mtime_ns


def _forget(work: Path, units: set[str]) -> None:
    """Remove all tables, failures and attempts of units, of whatever settings."""
    for stage in [entry for entry in work.iterdir() if entry.is_dir()]:
        for results in [entry for entry in stage.iterdir() if entry.is_dir()]:
            for name in names(results):
                if name.rpartition(".")[0] in units:
                    (results / name).unlink(missing_ok=True)
            for unit in units:
                (results / "failed" / f"{unit}.txt").unlink(missing_ok=True)
                attempts.clear(results / "attempts" / unit)
