"""`lens-jax data why`: all that is known of one image, from its row in the source to its place in a data set."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.progress import track

from lens_jax.console import make_console
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.tables import read_table
from lens_jax.data.engine.unit import Unit
from lens_jax.data.engine.units import group_of
from lens_jax.errors import LensError

_HEX = re.compile(r"[0-9a-f]{6,64}")
_MOST = 10


@dataclass(frozen=True)
class Story:
    """What the stages say of one image."""

    unit: Unit
    id: bytes
    # By the name of the stage, its rows: one, or for captions as many as were asked for.
    rows: Mapping[str, Sequence[Mapping[str, Any]]]


def find(layout: Layout, units: Sequence[Unit], wanted: str, show: bool = True) -> list[Story]:
    """The images that `wanted` names: by id, sha256, the beginning of either in hexadecimal digits, key, or URL.

    LensError where there is none.
    """
    stories = []
    console = make_console(stderr=True)
    given = track(units, "looking", console=console, transient=True) if show and console.is_terminal else units
    for unit in given:
        path = layout.table("probe", unit.id)
        if not path.exists():
            continue
        for index in _matches(read_table(path, ["id", "sha256", "key", "url"]), wanted):
            stories.append(_story(layout, unit, index))
            if len(stories) == _MOST:
                return stories
    if not stories:
        raise LensError(
            f"no image {wanted!r:.200} among the {len(units):,} units: give an id, a sha256 or the beginning of one in "
            "hexadecimal digits, a key, or a URL"
        )
    return stories


def _matches(table: pa.Table, wanted: str) -> Iterator[int]:
    hit = pc.or_(pc.equal(table["key"], wanted), pc.fill_null(pc.equal(table["url"], wanted), False))
    for index in pc.indices_nonzero(hit).to_pylist():
        yield index
    if _HEX.fullmatch(wanted.lower()):
        # Bytes compare by half: an odd last digit is looked at afterwards.
        start = bytes.fromhex(wanted.lower()[: len(wanted) // 2 * 2])
        for column in ("id", "sha256"):
            cut = pc.binary_slice(table[column].cast(pa.binary()), 0, len(start))
            near = pc.indices_nonzero(pc.fill_null(pc.equal(cut, pa.scalar(start, pa.binary())), False))
            for index in near.to_pylist():
                if table[column][index].as_py().hex().startswith(wanted.lower()):
                    yield index


def _story(layout: Layout, unit: Unit, index: int) -> Story:
    name = read_table(layout.table("probe", unit.id), ["id"])["id"][index].as_py()
    rows = {}
    for stage in layout.fingerprints:
        of = group_of(layout.work, unit.id) if stage == "write" else unit.id
        path = layout.table(stage, of) if of is not None else None
        if path is not None and path.exists():
            table = read_table(path)
            if "id" in table.column_names:
                rows[stage] = table.filter(pc.equal(table["id"], pa.scalar(name, table["id"].type))).to_pylist()
    return Story(unit, name, rows)


def lines(story: Story, root: str) -> Iterator[str]:
    """The story as text, a stage a paragraph."""
    yield f"image {story.id.hex()}"
    yield f"  source {story.unit.source}, {root}, {story.unit.path}, part {story.unit.part} of {story.unit.parts}"
    for stage, rows in story.rows.items():
        if not rows:
            yield f"{stage}: nothing of it"
        for row in rows:
            values = [(k, _plain(v)) for k, v in row.items() if k != "id" and v is not None and v != ""]
            yield f"{stage}: " + (", ".join(f"{name} {value}" for name, value in values) or "nothing found")


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and len(value) > 16:
        return f"of {len(value)} numbers"
    if isinstance(value, list) and value and isinstance(value[0], float):
        return " ".join(f"{part:.4g}" for part in value)
    return str(value)
