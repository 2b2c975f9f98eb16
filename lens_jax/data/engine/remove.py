"""`lens-jax data remove`: take images out of data sets that are packed, by rewriting the shards that hold them.

A curated subset has no images of its own: those taken out of the whole data set are out of it too, but it says by
position which records it chooses, and must be made again; until then reading it is an error. So must features that were
computed of the images. Both are left as they are, and named.

Every data set is whole at any time but an instant: new shards are written beside the old ones, then a note of what is
to be renamed, then they are renamed and the index is written. Where that is cut off, the next call ends it.
"""

import json
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

from lens_jax.atomic import write_json
from lens_jax.console import make_console
from lens_jax.data import records
from lens_jax.data.engine import removed
from lens_jax.data.index import FEATURES, NAME, Index, Shard, is_subset, load_index, read_source, shard_name
from lens_jax.data.index_writer import IndexWriter
from lens_jax.data.shards import ShardReader
from lens_jax.data.writer import HashedShard
from lens_jax.errors import LensError

REASON = "taken down"
_NOTE, _ASIDE = "removing.json", ".removing"
# Records of a shard that are held at a time.
_AT_A_TIME = 64


@dataclass(frozen=True)
class Outcome:
    """What a removal found."""

    # Records removed, in so many shards; ids asked for that are in no data set, which have been kept out all the same.
    records: int
    shards: int
    unknown: int
    # Subsets and stored features of what has changed, which must be made again.
    outdated: tuple[Path, ...] = ()


def remove(out: Path, ids: frozenset[bytes], show: bool = True) -> Outcome:
    """Take the images of these ids out of all data sets in `out`, and put them on the list of `removed.py` first.

    Rewrites the shards that hold one of them and no others, but looks at all records.
    """
    folders = [folder for folder in sorted(out.iterdir()) if (folder / NAME).is_file()] if out.is_dir() else []
    if not folders:
        raise LensError(f"{out}: no data sets in it; give the folder that `lens-jax data build` wrote, its `out`")
    removed.add(out, ids)
    derived = [folder for folder in folders if is_subset(folder) or read_source(folder) == FEATURES]
    own = [folder for folder in folders if folder not in derived]
    before = {load_index(folder).fingerprint for folder in own}
    found: set[bytes] = set()
    shards = 0
    for folder in own:
        finish(folder)
        shards += _remove_from(load_index(folder), ids, found, show)
    gone = before - {load_index(folder).fingerprint for folder in own}
    # The page shows images.
    (out / "report.html").unlink(missing_ok=True)
    for folder in own:
        (folder / "report.html").unlink(missing_ok=True)
    outdated = tuple(folder for folder in derived if _outdated(folder, gone))
    return Outcome(len(found), shards, len(ids - found), outdated)


def finish(folder: Path) -> None:
    """End a removal that was cut off in a data set, if one was."""
    note = folder / _NOTE
    if not note.is_file():
        for partial in folder.glob(f"*/*{_ASIDE}"):
            partial.unlink()
        return
    try:
        plan = json.loads(note.read_text())
        # Of the streams concerned all rows: their table may be the new one already while the index is still the old.
        rows = {name: [(int(a), int(b), str(c)) for a, b, c in of] for name, of in plan["streams"].items()}
        changed, captioned, dropped = list(plan["changed"]), plan["captioned"], plan["dropped"]
    except (ValueError, KeyError, TypeError) as error:
        raise LensError(f"{note}: damaged ({error}); prepare the data set again") from None
    index = load_index(folder)
    for name in changed:
        aside = folder / (name + _ASIDE)
        if aside.is_file():
            aside.replace(folder / name)
    writer = IndexWriter(folder)
    for stream in index.streams:
        for number in range(stream.shards):
            if stream.name in rows:
                row = rows[stream.name][number]
            else:
                shard = index.shard(stream, number)
                row = shard.records, shard.bytes, shard.sha256
            if row[0] == 0 and stream.name in rows:
                (folder / shard_name(stream.name, number)).unlink(missing_ok=True)
            writer.add(stream.split, stream.bucket, stream.text_class, *row)
    writer.finish(
        index.buckets,
        source=index.source,
        config=index.config,
        licence=index.licence,
        languages=index.languages,
        holdout_languages=index.holdout_languages,
        captioned=captioned,
        caption_classes=index.caption_classes,
        caption_count=index.caption_count,
        dropped=dropped,
        dropped_by_bucket=index.dropped_by_bucket,
        failed=index.failed,
    )
    note.unlink()


def _outdated(folder: Path, gone: Set[str]) -> bool:
    """Whether a subset's records are no longer there to be read, or features are of a state that is gone."""
    try:
        index = load_index(folder)
    except LensError:
        return True
    return index.features is not None and index.features["of"] in gone


def _remove_from(index: Index, ids: frozenset[bytes], found: set[bytes], show: bool) -> int:
    """Remove from one data set; how many shards that concerns. `found` is added to."""
    captioned = {split: Counter(counts) for split, counts in index.captioned.items()}
    changed: dict[str, tuple[int, int, str]] = {}
    gone = 0
    work = [(stream, shard) for stream in index.streams for shard in index.shards(stream)]
    console = make_console(stderr=True)
    for stream, shard in (
        track(work, "looking", console=console, transient=True) if show and console.is_terminal else work
    ):
        positions = []
        for position, entry in _entries(index.directory / shard.name, shard):
            record = records.decode(entry, f"{shard.name}[{position}]")
            name = _id_of(record)
            if name in ids:
                positions.append(position)
                found.add(name)
                captioned[stream.split].subtract(list(record.captions))
        if positions:
            changed[shard.name] = _write_without(index.directory / shard.name, shard, set(positions))
            gone += len(positions)
    if changed:
        counts = {split: {k: v for k, v in counter.items() if v > 0} for split, counter in captioned.items()}
        streams = {}
        for stream in index.streams:
            shards = [index.shard(stream, number) for number in range(stream.shards)]
            if any(shard.name in changed for shard in shards):
                streams[stream.name] = [changed.get(s.name, (s.records, s.bytes, s.sha256)) for s in shards]
        dropped = dict(index.dropped) | {REASON: index.dropped.get(REASON, 0) + gone}
        note = {"streams": streams, "changed": list(changed), "captioned": counts, "dropped": dropped}
        write_json(index.directory / _NOTE, note)
        finish(index.directory)
    return len(changed)


def _write_without(path: Path, shard: Shard, positions: set[int]) -> tuple[int, int, str]:
    """A copy of a shard beside it that lacks these records: (records, bytes, sha256). Nothing where none are left."""
    if len(positions) == shard.records:
        return 0, 0, shard.sha256
    copy = HashedShard(path.with_name(path.name + _ASIDE), compress=False)
    try:
        for position, entry in _entries(path, shard):
            if position not in positions:
                copy.write(entry)
        return copy.close()
    except BaseException:
        copy.abandon()
        raise


def _entries(path: Path, shard: Shard) -> Iterator[tuple[int, bytes]]:
    with ShardReader(path, shard.records, shard.bytes, decode=lambda entry, _: entry) as reader:
        for start in range(0, shard.records, _AT_A_TIME):
            positions = range(start, min(start + _AT_A_TIME, shard.records))
            yield from zip(positions, reader.read(positions))


def _id_of(record: records.Record) -> bytes | None:
    text = record.meta.get("id")
    try:
        return bytes.fromhex(text) if isinstance(text, str) else None
    except ValueError:
        return None
