"""Texts that too many images have, over all units: within one they are found when its table is made."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from lens_jax.data.engine.captions.job import OK
from lens_jax.data.engine.tables import CAPTION, read_metadata, read_table, write_table

ALIKE = "same as others"
# Hashes of texts that are held at a time, 8 bytes each.
_AT_ONCE = 64_000_000


def refuse_alike(paths: Sequence[Path], most: int) -> int:
    """Rewrite the tables CAPTION in which dense captions stand that more than `most` images of all of them have: their
    status says so. How many captions that are. A second time it finds nothing to do.
    """
    alike, refused = set(_find_alike(paths, most).tolist()), 0
    if not alike:
        return 0
    for path in paths:
        table = read_table(path)
        rows = table.to_pylist()
        here = [row for row in rows if _counts(row) and _hash(row["text"]) in alike]
        if not here:
            continue
        for row in here:
            row["status"] = ALIKE
        metadata = read_metadata(path)
        counts = Counter(json.loads(metadata["counts"]))
        counts.update({OK: -len(here), ALIKE: len(here)})
        metadata["counts"] = json.dumps(counts, sort_keys=True)
        write_table(path, pa.Table.from_pylist(rows, CAPTION), metadata)
        refused += len(here)
    return refused


def _find_alike(paths: Sequence[Path], most: int) -> np.ndarray:
    """uint64 [n]: hashes of the texts. In several passes where there are more texts than memory should hold."""
    total = sum(read_table(path, ["status"]).num_rows for path in paths)
    parts, found = max(1, -(-total // _AT_ONCE)), [np.zeros(0, np.uint64)]
    for part in range(parts):
        hashes = [np.zeros(0, np.uint64)]
        for path in paths:
            rows = read_table(path, ["kind", "text", "status"]).to_pylist()
            here = np.array([_hash(row["text"]) for row in rows if _counts(row)], np.uint64)
            hashes.append(here[here % np.uint64(parts) == part])
        values, counts = np.unique(np.concatenate(hashes), return_counts=True)
        found.append(values[counts > most])
    return np.concatenate(found)


def _counts(row: dict[str, object]) -> bool:
    # Brief captions are alike by nature.
    return row["status"] == OK and row["kind"] == "dense" and bool(row["text"])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
