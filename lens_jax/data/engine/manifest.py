"""The index of a data set whose shards are written, which is what training reads, and the mixture of all of them.

Both come last: while there is no index there is no data set. Where one is there already and is what would be written,
nothing is touched; where it is another, nothing is either, and that is an error.
"""

import contextlib
import hashlib
import json
import re
import shutil
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from lens_jax.data import mixture_file
from lens_jax.data.buckets import parse_bucket, parse_buckets
from lens_jax.data.engine.config import EngineConfig, Source, plain
from lens_jax.data.engine.funnel import Funnel
from lens_jax.data.engine.groups import Group, shards_a_group
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.tables import read_table
from lens_jax.data.engine.write import BRIEF
from lens_jax.data.index import NAME, SPLITS, Index, load_index
from lens_jax.data.index_writer import IndexWriter
from lens_jax.data.prepare_report import MAX_NAMED_FAILURES
from lens_jax.errors import LensError, LensWarning

# Index.source of such data sets.
SOURCE = "engine"
MIXTURE = "mixture.json"
_NONE = hashlib.sha256().hexdigest()


def is_finished(config: EngineConfig, source: Source, groups: Sequence[Group], layout: Layout) -> bool:
    """Whether the data set of a source is there and whole, made of just these groups. Asked before any is written.

    LensError where another data set is in its place.
    """
    folder = Path(config.out) / source.name
    if not (folder / NAME).exists():
        return False
    index = load_index(folder)
    if index.source != SOURCE or index.config.get("made_of") != made_of(layout, groups):
        raise LensError(
            f"{folder}: holds another data set, of other images or settings; remove it, or choose another `out`"
        )
    index.check()
    return True


def finish(config: EngineConfig, source: Source, groups: Sequence[Group], layout: Layout) -> Index | None:
    """Write the index of a source from the tables of all its groups; None, and a warning, where no image is left.

    LensError where a group has not been written.
    """
    folder, writer = Path(config.out) / source.name, None
    if is_finished(config, source, groups, layout):
        return load_index(folder)
    seen = _Seen(config, source)
    for group in groups:
        seen.add(group, layout)
    if not seen.records:
        reasons = ", ".join(f"{count} {reason}" for reason, count in seen.dropped.most_common(4)) or "it has none"
        warnings.warn(f"source {source.name}: no image is left of it: {reasons}", LensWarning, stacklevel=2)
        return None
    writer = IndexWriter(folder)
    try:
        most = shards_a_group(config) * len(groups)
        for key, shards in sorted(seen.shards.items(), key=lambda pair: (pair[0][0], str(pair[0][1]), pair[0][2])):
            for number in range(min(most, max(shards) + 1)):
                # Numbers that a group has not used stand for shards of nothing.
                writer.add(*key, *shards.get(number, (0, 0, _NONE)))
        languages, brief = seen.languages()
        index = writer.finish(
            parse_buckets(config.buckets),
            source=SOURCE,
            config=_settings(config, seen.funnel, made_of(layout, groups)),
            licence=source.licence,
            languages=languages,
            holdout_languages=brief,
            captioned={split: dict(counts) for split, counts in seen.captioned.items()},
            caption_classes=config.caption_classes,
            caption_count="estimate" if config.caption_classes else "",
            dropped=dict(sorted(seen.dropped.items())),
            failed=tuple(seen.named),
        )
    except BaseException:
        writer.abandon()
        raise
    _remove_others(folder, index)
    return index


def write_mixture(config: EngineConfig, indexes: Mapping[str, Index | None]) -> Path:
    """`mixture.json` in `out`, from the indexes by the names of their sources: what there is, with its weight.

    Training reads it in place of a data set; another weight there moves no image. LensError where nothing is left.
    """
    path = Path(config.out) / MIXTURE
    entries = [(source.name, source.weight) for source in config.sources if indexes.get(source.name) is not None]
    if not entries:
        raise LensError(f"{config.out}: no image is left of any source; `lens-jax data report` shows where they went")
    mixture_file.write(path, entries)
    return path


class _Seen:
    """What the tables of a source's groups say, added up."""

    def __init__(self, config: EngineConfig, source: Source):
        self.funnel = Funnel(config, source)
        # By stream (split, bucket, class) and number: (records, bytes, sha256).
        self.shards: dict[tuple, dict[int, tuple[int, int, str]]] = defaultdict(dict)
        self.captioned: dict[str, Counter[str]] = defaultdict(Counter)
        self.dropped: Counter[str] = Counter()
        self.named: list[dict[str, str]] = []
        self.records = 0
        self._split: Counter[str] = Counter()

    def add(self, group: Group, layout: Layout) -> None:
        path = layout.table("write", group.unit.id)
        if not path.exists():
            raise LensError(f"group {group.unit.part} of {group.unit.source}: it has not been written: {path}")
        first: dict[tuple, dict] = {}
        counts: Counter[tuple] = Counter()
        problems: dict[bytes, dict] = {}
        for row in read_table(path).to_pylist():
            if row["problem"] is not None:
                problems[row["id"]] = row
                continue
            key = row["split"], parse_bucket(row["bucket"]), row["text_class"]
            counts[key, row["shard"]] += 1
            if row["position"] == 0:
                first[key, row["shard"]] = row
            self.captioned[row["split"]].update(row["languages"])
            self._split[row["split"]] += 1
            self.records += 1
        for (key, number), row in first.items():
            self.shards[key][number] = counts[key, number], row["shard_bytes"], row["shard_sha256"].hex()
        for unit in group.members:
            self._add_decisions(layout, unit.id, problems)

    def _add_decisions(self, layout: Layout, unit: str, problems: Mapping[bytes, dict]) -> None:
        decision = read_table(layout.table("select", unit))
        self.funnel.add(decision)
        kept, reasons, ids = (decision[name].to_pylist() for name in ("kept", "reason", "id"))
        lost = {
            place: problems[id]["problem"] if yes else reason
            for place, (yes, reason, id) in enumerate(zip(kept, reasons, ids))
            if not yes or id in problems
        }
        self.dropped.update(lost.values())
        if lost and len(self.named) < MAX_NAMED_FAILURES:
            probe = read_table(layout.table("probe", unit), ["key", "detail"]).to_pylist()
            values = decision["value"].to_pylist()
            for place, reason in list(lost.items())[: MAX_NAMED_FAILURES - len(self.named)]:
                detail = problems.get(ids[place], probe[place])["detail"] or ""
                if not detail and values[place] is not None:
                    detail = f"{values[place]:.6g}"
                self.named.append({"file": probe[place]["key"], "reason": reason, "detail": detail})

    def languages(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(languages that captions are drawn from, those to ask for by name): dense captions alone where all have one.

        The report trains on dense captions only.
        """
        known = sorted({name for counts in self.captioned.values() for name in counts})
        brief = tuple(name for name in known if name.endswith(BRIEF))
        dense = tuple(name for name in known if name not in brief)
        reached = {split: sum(counts[name] for name in dense) for split, counts in self.captioned.items()}
        if all(reached[split] >= self._split[split] for split in SPLITS if self._split[split]):
            return dense, brief
        return tuple(known), ()


def made_of(layout: Layout, groups: Sequence[Group]) -> str:
    """Names a data set by the settings and the images that it is made of."""
    text = "\n".join([layout.fingerprints["write"], *(group.unit.id for group in groups)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _settings(config: EngineConfig, funnel: Funnel, name: str) -> dict[str, object]:
    text = json.dumps({"made_of": name, "steps": funnel.rows(), **plain(config)}, default=str)
    # A path need not be UTF-8; what is stored must be.
    return json.loads(text.encode("utf-8", "replace"))


def _remove_others(folder: Path, index: Index) -> None:
    """Remove shards and tables that are not of the data set: of a build with other settings that was not finished."""
    names = {shard.name for stream in index.streams for shard in index.shards(stream)}
    streams = {stream.name for stream in index.streams}
    for path in folder.iterdir():
        if not re.fullmatch(r"(train|validation)-\d+x\d+(-text\d+)?(\.shards)?", path.name):
            continue
        if path.is_dir() and path.name not in streams:
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir():
            for file in path.iterdir():
                if f"{path.name}/{file.name}" not in names:
                    with contextlib.suppress(OSError):
                        file.unlink()
        elif path.name.removesuffix(".shards") not in streams:
            path.unlink()
