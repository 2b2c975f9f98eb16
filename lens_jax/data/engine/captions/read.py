"""The captions that may be used: what writing the data sets reads."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from lens_jax.data.engine.captions.job import OK
from lens_jax.data.engine.tables import read_table

# Names of languages in records. A brief caption is one of a language of its own, so that training can weigh it.
BRIEF = "{}-x-brief"
# Hashes of texts held at a time, 8 bytes each.
_AT_ONCE = 64_000_000


def captions(path: Path, alike: np.ndarray | None = None) -> dict[bytes, Mapping[str, tuple[str, ...]]]:
    """{id: {language: texts}} of a unit's table CAPTION: those with the status ok, brief ones as en-x-brief.

    `alike` are the hashes of texts that too many images have, of `find_alike`. An image without a caption is not in it.
    """
    found: dict[bytes, dict[str, tuple[str, ...]]] = {}
    table = read_table(path, ["id", "language", "kind", "text", "status", "model"])
    refused = set() if alike is None else set(alike.tolist())
    for row in table.to_pylist():
        if row["status"] != OK or not row["text"]:
            continue
        if row["kind"] == "dense" and row["model"] and _hash(row["text"]) in refused:
            continue
        language = row["language"] if row["kind"] == "dense" else BRIEF.format(row["language"])
        held = found.setdefault(row["id"], {})
        held[language] = (*held.get(language, ()), row["text"])
    return found


def find_alike(paths: Iterable[Path], most: int) -> np.ndarray:
    """uint64 [n], sorted: hashes of the dense captions by a model that more than `most` images of all tables have.

    Within a unit these are found when its table is made; here those that only many units together show.
    """
    paths, found = list(paths), []
    rows = 0
    for path in paths:
        rows += read_table(path, ["status"]).num_rows
    parts = max(1, -(-rows // _AT_ONCE))
    for part in range(parts):
        hashes = []
        for path in paths:
            table = read_table(path, ["kind", "text", "status", "model"])
            here = [
                _hash(row["text"])
                for row in table.to_pylist()
                if row["status"] == OK and row["kind"] == "dense" and row["model"] and row["text"]
            ]
            hashes.append(np.array([value for value in here if value % parts == part], np.uint64))
        values, counts = np.unique(np.concatenate(hashes or [np.zeros(0, np.uint64)]), return_counts=True)
        found.append(values[counts > most])
    return np.sort(np.concatenate(found))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
