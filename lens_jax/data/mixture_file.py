"""Several data sets and how often each is seen, as a file beside them that training reads in place of one.

    {"format": "lens-jax mixture", "version": 1, "sources": [{"path": "photographs", "weight": 1.0}, ...]}

A path is relative to the file. A weight is how often an image of the data set is seen relative to the others'.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from lens_jax.atomic import write_json
from lens_jax.data.config import DataConfig
from lens_jax.errors import LensError

FORMAT = "lens-jax mixture"
VERSION = 1
_MAX_BYTES = 1 << 20


def write(path: str | os.PathLike, entries: Sequence[tuple[str, float]]) -> None:
    """Write (path, weight) of some data sets; a file that says the same already is left alone."""
    sources = [{"path": name, "weight": weight} for name, weight in entries]
    values = {"format": FORMAT, "version": VERSION, "sources": sources}
    if Path(path).is_file() and _load(Path(path)) == values:
        return
    write_json(path, values)


def read(path: str | os.PathLike) -> list[tuple[str, float]]:
    """(path, weight) of its data sets, paths as they are found from here. LensError for what is no such file."""
    path = Path(path)
    values = _load(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise LensError(f'{path}: not a mixture ("format" is not {FORMAT!r})')
    if values.get("version") != VERSION:
        raise LensError(f"{path}: format version {values.get('version')!r:.40}; this program reads {VERSION}")
    found = []
    for entry in values["sources"] if isinstance(values.get("sources"), list) else ():
        name, weight = (entry.get("path"), entry.get("weight")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not name or "\0" in name:
            raise LensError(f"{path}: sources: each needs a `path`, found {entry!r:.80}")
        if type(weight) not in (int, float) or not 0 <= weight < 1e300:
            raise LensError(f"{path}: sources: weight of {name!r:.80} is {weight!r:.40}; it must be at least 0")
        found.append((os.path.normpath(path.parent / name), float(weight)))
    if not any(weight for _, weight in found):
        raise LensError(f"{path}: sources: at least one with a weight above 0 is needed")
    return found


def resolve(config: DataConfig) -> DataConfig:
    """The config with the data sets of the mixture that its path names; itself where that is a data set's."""
    if config.sources or not config.path.endswith(".json"):
        return config
    paths, weights = zip(*read(config.path))
    if config.source_weights:
        raise LensError(f"data.source_weights {config.source_weights}: {config.path} has the weights of its sources")
    return dataclasses.replace(config, sources=paths, source_weights=weights)


def _load(path: Path) -> object:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise LensError(f"{path}: over {_MAX_BYTES} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise LensError(f"{path}: cannot be read as JSON ({type(error).__name__})") from error
