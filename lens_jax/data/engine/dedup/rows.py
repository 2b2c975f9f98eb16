"""The rows of a unit among which duplicates are looked for, and arrays on disk."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from lens_jax.atomic import new_directory
from lens_jax.data.engine.config import EngineConfig, Source
from lens_jax.data.engine.dedup import exact
from lens_jax.data.engine.dedup.cells import usable
from lens_jax.data.engine.dedup.priority import as_keys, make_keys
from lens_jax.data.engine.tables import read_table, vectors_of
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError

Arrays = TypeVar("Arrays", bound=tuple)


class Rows(NamedTuple):
    """Rows of a unit, in its order."""

    # Place in the tables of the unit, int64 [n].
    index: np.ndarray
    # Hash of the file, S32 [n], and the key, S [n] (see priority.py).
    sha256: np.ndarray
    keys: np.ndarray
    # float16 [n, D]; zero where there is none. D is 0 where nothing was embedded.
    vectors: np.ndarray


class Reader(NamedTuple):
    """Reads the rows of a unit from the tables of the stages before. It can be sent to another machine, which must see
    the same work folder."""

    config: EngineConfig
    # From the name of a stage and the id of a unit to its table, such as `Layout.table`.
    table: Callable[[str, str], Path]
    # From a config, a source and its tables to bool [n]: what the other steps keep. An image that is dropped anyway
    # must not displace a good one.
    survivors: Callable[[EngineConfig, Source, Mapping[str, pa.Table]], np.ndarray]

    def __call__(self, unit: Unit) -> Rows:
        """LensError where a table is missing or another than it should be."""
        names = ["probe", "measure", "score", *(["embed"] if self.config.models.embedding else [])]
        tables = {name: read_table(self.table(name, unit.id)) for name in names}
        if len({len(table) for table in tables.values()}) > 1:
            raise LensError(f"unit {unit.id}: {', '.join(names)} have not the same number of rows")
        return rows_of(self.config, tables, self.survivors(self.config, self.config.source(unit.source), tables))


def rows_of(config: EngineConfig, tables: Mapping[str, pa.Table], survivors: np.ndarray) -> Rows:
    """The rows `survivors`, bool [n], of a unit's tables probe, measure, score and, if any, embed."""
    index = np.flatnonzero(survivors)
    probe = tables["probe"].take(index)
    number = lambda column, kind: column.cast(kind).to_numpy(zero_copy_only=False)
    area = number(probe["width"], pa.float64()) * number(probe["height"], pa.float64())
    aesthetic = number(tables["score"]["aesthetic"].take(index), pa.float32())
    columns = {"id": _fixed(probe["id"], 16), "area": np.nan_to_num(area, nan=-1), "aesthetic": aesthetic}
    keys = make_keys(config.dedup.priority, columns)
    return Rows(index, as_keys(_fixed(probe["sha256"], exact.SHA_BYTES)), keys, _vectors(tables.get("embed"), index))


def comparable(rows: Rows, firsts: exact.Firsts) -> tuple[np.ndarray, np.ndarray]:
    """Keys S [m] and vectors float16 [m, D] of the rows that are compared: each file once, and those with a vector."""
    which = exact.first_of_each(rows.sha256, rows.keys, firsts) == rows.keys
    which &= usable(rows.vectors)
    return rows.keys[which], rows.vectors[which]


def fixed_bytes(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """A column of binary values of `width` bytes, none of them null, as uint8 [n, width]."""
    whole = lambda chunk: chunk.buffers()[1][chunk.offset * width : (chunk.offset + len(chunk)) * width]
    data = b"".join(whole(chunk) for chunk in column.chunks if len(chunk))
    return np.frombuffer(data, np.uint8).reshape(-1, width)


def save_arrays(folder: Path, arrays: NamedTuple) -> None:
    """The fields of a named tuple of arrays, a file each, as a folder that is there whole or not at all."""
    with new_directory(folder, True, "done") as partial:
        for name, value in arrays._asdict().items():
            np.save(partial / f"{name}.npy", value, allow_pickle=False)
        (partial / "done").touch()


def load_arrays(folder: Path, kind: type[Arrays]) -> Arrays:
    """What `save_arrays` wrote, mapped into memory."""
    try:
        return kind(*(_mapped(folder / f"{name}.npy") for name in kind._fields))
    except (OSError, ValueError) as error:
        raise LensError(f"{folder}: not arrays of this engine ({error}); remove it") from None


def _mapped(path: Path) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return np.asarray(array) if array.size else np.array(array)


def _fixed(column: pa.ChunkedArray, width: int) -> np.ndarray:
    if column.null_count:
        raise LensError("a row that other steps keep has no id or no hash of its file")
    return fixed_bytes(column, width)


def _vectors(table: pa.Table | None, index: np.ndarray) -> np.ndarray:
    if table is None:
        return np.zeros((len(index), 0), np.float16)
    values, _ = vectors_of(table["embedding"])
    return values[index]
