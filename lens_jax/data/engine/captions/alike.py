"""Texts that too many images have, over all units: no caption says what is in fifty images. Either a model repeats
itself, or the images say nothing. Within a unit they are found when its table is made, so that a model that does
nothing else stops the run early; what is in force is the number in all units.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lens_jax.data.engine.captions.job import OK
from lens_jax.data.engine.tables import CAPTION, read_metadata, read_table, write_table

ALIKE = "same as others"
# Hashes of texts that are held at a time, 8 bytes each.
_AT_ONCE = 64_000_000


def refuse_alike(paths: Sequence[Path], most: int) -> int:
    """Rewrite the tables CAPTION in which dense captions stand that more than `most` images of all of them have: their
    status says so. How many captions that are. A second time it finds nothing to do, and several processes may do it
    at once: each table they write is the same.
    """
    alike, refused = np.sort(_find_alike(paths, most)), 0
    if not len(alike):
        return 0
    for path in paths:
        table = read_table(path)
        given = _given(table) & pc.equal(table["status"], OK).to_numpy()
        given[given] = np.isin(_hashes(table["text"].filter(given)), alike)
        count = int(np.count_nonzero(given))
        if not count:
            continue
        status = pc.if_else(pa.array(given), ALIKE, table["status"])
        table = table.set_column(table.schema.get_field_index("status"), CAPTION.field("status"), status)
        metadata = read_metadata(path)
        counts = Counter(json.loads(metadata["counts"]))
        counts.update({OK: -count, ALIKE: count})
        metadata["counts"] = json.dumps(counts, sort_keys=True)
        write_table(path, table, metadata)
        refused += count
    return refused


def _find_alike(paths: Sequence[Path], most: int) -> np.ndarray:
    """uint64 [n]: hashes of the texts. In several passes where there are more texts than memory should hold."""
    total = sum(read_table(path, ["status"]).num_rows for path in paths)
    parts, found = max(1, -(-total // _AT_ONCE)), [np.zeros(0, np.uint64)]
    for part in range(parts):
        hashes = [np.zeros(0, np.uint64)]
        for path in paths:
            table = read_table(path, ["kind", "text", "status"])
            here = _hashes(table["text"].filter(_given(table)))
            hashes.append(here[here % np.uint64(parts) == part])
        values, counts = np.unique(np.concatenate(hashes), return_counts=True)
        found.append(values[counts > most])
    return np.concatenate(found)


def _given(table: pa.Table) -> np.ndarray:
    """bool [n]: dense captions, those that are refused for being alike too. Brief ones are alike by nature."""
    status = pc.is_in(table["status"], pa.array([OK, ALIKE]))
    there = pc.greater(pc.utf8_length(table["text"]), 0)
    given = pc.and_(pc.and_(status, pc.equal(table["kind"], "dense")), pc.fill_null(there, False))
    return pc.fill_null(given, False).to_numpy()


def _hashes(texts: pa.ChunkedArray) -> np.ndarray:
    """uint64 [n]."""
    return np.array([_hash(text) for text in texts.to_pylist()], np.uint64)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
