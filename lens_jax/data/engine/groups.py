"""Which units are written together, and what each group of them is named by.

A group writes its own shards and knows nothing of the others. Its name follows from what is written: from its images
and from what was decided about them, so a group that has been written is written again only where that has changed.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from lens_jax.data.buckets import parse_buckets
from lens_jax.data.engine.config import EngineConfig
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.select import groups as group_numbers
from lens_jax.data.engine.tables import read_table
from lens_jax.data.engine.unit import Unit, make_unit
from lens_jax.data.writer import SHARD_BYTES
from lens_jax.errors import LensError

# What is written depends on these columns of the tables of a unit, besides the settings that stages are named by.
_READ = {"probe": ["id", "sha256", "bytes"], "select": ["kept", "bucket", "split"]}
# A caption that failed and was asked for again has another status.
_CAPTIONS = ["id", "kind", "status"]


@dataclass(frozen=True)
class Group:
    """Units of one source whose images go into the same shards."""

    # What the stage `write` is run on: `part` is the number of the group in its source.
    unit: Unit
    members: tuple[Unit, ...]


def find_groups(config: EngineConfig, layout: Layout, units: Sequence[Unit]) -> list[Group]:
    """The groups of a run, from its units in order. LensError where one of them has not been selected from."""
    seen = [_digest(config, layout, unit) for unit in units]
    numbers = group_numbers([(unit.source, size) for unit, (size, _) in zip(units, seen)], config.group_bytes)
    members: dict[tuple[str, int], list[int]] = {}
    for place, (unit, number) in enumerate(zip(units, numbers)):
        members.setdefault((unit.source, number), []).append(place)
    count = {source: number + 1 for source, number in members}
    found = []
    for (source, number), places in members.items():
        name = hashlib.blake2b(b"".join(seen[place][1] for place in places), digest_size=16).hexdigest()
        unit = make_unit(source, f"group-{name}", number, count[source])
        found.append(Group(unit, tuple(units[place] for place in places)))
    return found


def by_unit(groups: Sequence[Group]) -> Mapping[str, tuple[Unit, ...]]:
    """The members of each group by the id of its unit."""
    return {group.unit.id: group.members for group in groups}


def shards_a_group(config: EngineConfig) -> int:
    """How many shards of a stream a group may have, so that a shard's number follows from the group's.

    As many as its bytes fill if they are spread evenly over the streams of a split; the last one takes the rest.
    """
    streams = len(parse_buckets(config.buckets)) * (len(config.caption_classes) + 1)
    return max(1, -(-config.group_bytes // (SHARD_BYTES * streams)))


def _digest(config: EngineConfig, layout: Layout, unit: Unit) -> tuple[int, bytes]:
    """(bytes of a unit's images, hash of what will be written of it)."""
    digest, size = hashlib.blake2b(unit.id.encode(), digest_size=16), 0
    for stage, columns in (_READ | ({"caption": _CAPTIONS} if is_captioned(config, unit.source) else {})).items():
        path = layout.table(stage, unit.id)
        if not path.exists():
            raise LensError(f"{unit.path}: stage write reads stage {stage}, which has not been run: {path}")
        table = read_table(path, columns).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
            writer.write_table(table.replace_schema_metadata(None))
        digest.update(sink.getvalue())
        if stage == "probe":
            size = sum(value or 0 for value in table["bytes"].to_pylist())
    return size, digest.digest()


def is_captioned(config: EngineConfig, source: str) -> bool:
    """Whether captions of a source are written by a model."""
    return config.caption is not None and config.source(source).caption != "keep"
