"""The table of near duplicates that one piece of the comparison found.

A row is a pair, or has no `first`: then the list of `second` may have been cut off in `cell` (see near.py).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute

from lens_jax.data.engine.dedup.near import Pairs, distinct
from lens_jax.data.engine.dedup.priority import as_bytes, as_keys
from lens_jax.data.engine.dedup.rows import fixed_bytes
from lens_jax.data.engine.tables import read_table, write_table


class Cut(NamedTuple):
    """Rows whose list of duplicates may be cut off: keys S [n], and in which cell, int64 [n]."""

    keys: np.ndarray
    cells: np.ndarray


def write_found(path: Path, pairs: Pairs, cut: Cut) -> None:
    """Write what was found, pairs sorted and each once."""
    pairs = distinct([pairs])
    order = np.lexsort((cut.cells, cut.keys))
    width = pairs.second.dtype.itemsize
    nothing = lambda count, kind: pa.nulls(count, kind)
    columns = {
        "first": [_column(pairs.first), nothing(len(order), pa.binary(width))],
        "second": [_column(pairs.second), _column(cut.keys[order])],
        "cosine": [pa.array(pairs.cosine, pa.float32()), nothing(len(order), pa.float32())],
        "cell": [nothing(len(pairs.first), pa.int64()), pa.array(cut.cells[order], pa.int64())],
    }
    write_table(path, pa.table({name: pa.chunked_array(chunks) for name, chunks in columns.items()}))


def read_found(paths: list[Path], width: int) -> tuple[Pairs, Cut]:
    """What several pieces found; `width` is that of keys in bytes."""
    pairs, cuts = [], []
    for path in paths:
        table = read_table(path)
        is_pair = table["first"].is_valid()
        those = table.filter(is_pair)
        cosine = those["cosine"].to_numpy()
        pairs.append(Pairs(_keys(those["first"], width), _keys(those["second"], width), cosine))
        those = table.filter(pa.compute.invert(is_pair))
        cuts.append(Cut(_keys(those["second"], width), those["cell"].to_numpy()))
    none = np.empty(0, f"S{width}")
    pairs.append(Pairs(none, none, np.empty(0, np.float32)))
    cuts.append(Cut(none, np.empty(0, np.int64)))
    return distinct(pairs), Cut(*(np.concatenate(column) for column in zip(*cuts)))


def _column(keys: np.ndarray) -> pa.Array:
    data = pa.py_buffer(as_bytes(keys).tobytes())
    return pa.Array.from_buffers(pa.binary(keys.dtype.itemsize), len(keys), [None, data])


def _keys(column: pa.ChunkedArray, width: int) -> np.ndarray:
    return as_keys(fixed_bytes(column, width))
