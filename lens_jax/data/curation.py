"""Which records of a data set are taken into a curated one: the best of each kind, and as many of every kind.

The report distils on 100K pairs "curated" from 800 million by aesthetics and other measures of quality, balanced over
five kinds (report, section 6). What it measures, and by what threshold, it does not say: here scores are numbers that
somebody has stored with the records, or beside them in a table.
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lens_jax.errors import LensError

# The report's, by the names that we give them.
REPORT_KINDS = ("portraits", "landscapes", "visual-content", "styles", "text-rich")
# Those of the pictogram world: one object, one several times, several in places, two in a relation, written words.
SCENE_KINDS = ("one", "counting", "places", "relations", "text")
# Of a value in a message.
_SHOWN = 60


@dataclass(frozen=True)
class Facts:
    """What is known of a record that may be chosen."""

    kind: str
    # In the order that they were asked for; more is better.
    scores: tuple[float, ...]


def scene_kind(meta: Mapping[str, Any]) -> str | None:
    """Of a record of the pictogram world (`scenes.scene_meta`): one of SCENE_KINDS, or "reference"; None of others."""
    concepts = meta.get("concepts")
    if meta.get("kind") == "reference":
        return "reference"
    if meta.get("kind") != "scene" or not isinstance(concepts, list | tuple):
        return None
    if meta.get("word"):
        return "text"
    if len(concepts) < 2:
        return "one"
    if len(set(map(str, concepts))) == 1:
        return "counting"
    return "relations" if meta.get("relation") else "places"


def read_table(path: str, key: str) -> dict[str, dict[str, Any]]:
    """The rows of a table, JSON lines or CSV (.csv), by what their column `key` says; LensError names a bad line."""
    rows: dict[str, dict[str, Any]] = {}
    try:
        for line, row in _rows(Path(path)):
            where = f"{path}:{line}"
            name = row.get(key)
            if not isinstance(name, str) or not name:
                raise LensError(f"{where}: no text in the column {key!r}; it has {', '.join(map(str, row))[:200]}")
            if name in rows:
                raise LensError(f"{where}: {name!r:.{_SHOWN}} is there a second time")
            rows[name] = row
    except OSError as error:
        raise LensError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LensError(f"{path}: not UTF-8") from None
    except csv.Error as error:
        raise LensError(f"{path}: not CSV: {error}") from None
    if not rows:
        raise LensError(f"{path}: a table without rows")
    return rows


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise LensError(f"{path}:{reader.line_num}: as many cells as the header has columns are needed")
                yield reader.line_num, row
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise LensError(f"{path}:{number}: not JSON: one object a line is needed") from None
            if not isinstance(row, dict):
                raise LensError(f"{path}:{number}: not a JSON object")
            yield number, row


def facts(values: Mapping[str, Any], kind: str | None, kind_key: str, scores: Sequence[str], where: str) -> Facts:
    """Of a record with these values, of its `meta` or of a table; LensError names what is missing, and what there is.

    kind: where it is known already, as in the pictogram world; else it is the text under `kind_key`.
    """
    has = f"it has {', '.join(map(str, values))[:200] or 'nothing'}"
    if kind is None:
        kind = values.get(kind_key)
        if not isinstance(kind, str) or not kind:
            raise LensError(f"{where}: no kind under {kind_key!r}; {has}")
    numbers = []
    for name in scores:
        value = values.get(name)
        try:
            number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            said = f"its {name!r} is {value!r:.{_SHOWN}}, no finite number" if name in values else f"no score {name!r}"
            raise LensError(f"{where}: {said}; {has}")
        numbers.append(number)
    return Facts(kind, tuple(numbers))


def shares(images: int, available: Mapping[str, int], fill: bool) -> dict[str, int]:
    """How many of each kind are taken: equally many, those named first one more where that does not come out even.

    images: in all; 0 is as many as the rarest kind allows. fill: where a kind has too few, take all of it and more of
    the others; without, that is a LensError.
    """
    if images == 0:
        images = min(available.values()) * len(available)
    if images < len(available):
        rarest = min(available, key=available.get)
        raise LensError(
            f"--images {images}: fewer than the {len(available)} kinds; the rarest, {rarest!r}, has {available[rarest]}"
        )
    even = {kind: images // len(available) + (i < images % len(available)) for i, kind in enumerate(available)}
    short = [kind for kind, share in even.items() if available[kind] < share]
    if not short:
        return even
    if not fill:
        said = ", ".join(f"{kind!r} has {available[kind]} of {even[kind]}" for kind in short)
        raise LensError(
            f"--images {images}: too few of some kinds: {said}; give fewer, --images 0 for as many as the rarest kind "
            "allows, or --fill to take more of the others"
        )
    if images > sum(available.values()):
        raise LensError(f"--images {images}: there are {sum(available.values())} in all")
    found, left, names = {}, images, sorted(available, key=lambda kind: available[kind])
    for i, kind in enumerate(names):
        found[kind] = min(available[kind], left // (len(names) - i))
        left -= found[kind]
    return {kind: found[kind] for kind in available}


def best(scores: np.ndarray, count: int, ties: np.ndarray) -> np.ndarray:
    """Rows of the `count` best of some records of one kind, rising.

    scores: float64 [n, s]; of several what counts is the mean of a record's ranks, so that their units do not matter.
    Of equals, and without scores, the lowest of `ties` (random numbers) come first.
    """
    rank = np.zeros(len(scores))
    for column in scores.T:
        _, place = np.unique(column, return_inverse=True)
        rank += place / max(1, place.max(initial=0))
    return np.sort(np.lexsort((ties, -rank))[:count])
