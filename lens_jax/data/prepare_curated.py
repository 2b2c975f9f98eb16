"""`lens-jax prepare curated`: the best of a prepared data set, as many of each kind, without a copy of the images."""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lens_jax.atomic import new_directory
from lens_jax.data import curation, subset
from lens_jax.data.index import Index, load_index
from lens_jax.data.index_writer import IndexWriter
from lens_jax.data.permutation import mix
from lens_jax.data.pipeline import choose_caption
from lens_jax.data.prepare_report import plain, report
from lens_jax.data.prepare_report import progress as show_progress
from lens_jax.data.subset import Subset
from lens_jax.errors import LensError

MANIFEST, CAPTIONS = "curated.json", "captions.jsonl"
# Records that are read at a time.
_TOGETHER = 64
# Separates these random numbers from others of the same seed.
_TIES, _CAPTION = 0xC1, 0xC2


@dataclass(frozen=True)
class CuratedConfig:
    """The best images of a prepared data set, as many of each kind: a data set that has no images of its own.

    Its train split alone. Beside it, a caption of each image (captions.jsonl, to distil without images), and how many
    of each kind there were (curated.json).
    """

    # The prepared data set, which must stay where it is.
    path: str
    # Directory to write; it must not exist yet.
    out: str = "data/curated"
    # Images in all. Report: 100,000. 0 is as many as the rarest kind allows.
    images: int = 100_000
    # Where the kind of a record is: a key of its meta, or a column of the table. Empty is "kind", or in the pictogram
    # world what a scene shows.
    kind: str = ""
    # Kinds that are taken, equally many of each. () is the report's five (portraits landscapes visual-content styles
    # text-rich), or in the pictogram world one counting places relations text.
    kinds: tuple[str, ...] = ()
    # What makes one record better than another: keys of its meta, or columns of the table, with a number each; of
    # several the mean of the ranks counts. () takes any, at random.
    scores: tuple[str, ...] = ()
    # The least value of each score; () is none.
    least: tuple[float, ...] = ()
    # A table with kinds and scores, JSON lines or CSV (.csv), in place of the records' meta.
    table: str = ""
    # Its column that names a record, by its source: of a prepared folder the image's path in it.
    table_key: str = "file_name"
    # Leave out records without a kind or a score. Otherwise the first such record is an error.
    skip_missing: bool = False
    # Where a kind has too few records, take all of it and more of the others.
    fill: bool = False
    # Draws among equals, and captions.
    seed: int = 0
    # Replace a curated set that is already there.
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A record that may be taken."""

    stream: str
    shard: int
    position: int
    scores: tuple[float, ...]
    languages: tuple[str, ...]


def prepare_curated(config: CuratedConfig, progress: bool = True) -> Path:
    """Write the curated set to config.out and return that path. Same data set and config, same records."""
    whole = load_index(config.path)
    _check(config, whole)
    found: dict[str, list[_Candidate]] = {kind: [] for kind in _kinds(config, whole)}
    left_out: Counter[str] = Counter()
    total = sum(stream.records for stream in whole.select("train"))
    for kind, candidate in show_progress(_candidates(config, whole), total, "judging", progress):
        if candidate is None:
            left_out[kind] += 1
        elif kind not in found:
            left_out["of other kinds"] += 1
        elif any(score < least for score, least in zip(candidate.scores, config.least)):
            left_out["below the least score"] += 1
        else:
            found[kind].append(candidate)
    shares = curation.shares(config.images, _available(config, found, left_out), config.fill)
    chosen = {kind: _best(config, found[kind], share) for kind, share in shares.items()}
    with new_directory(config.out, config.overwrite, MANIFEST) as directory:
        _write_index(config, whole, chosen, directory, left_out)
        _write_captions(config, chosen, directory, progress)
        text = json.dumps(_manifest(config, whole, found, chosen, left_out), indent=1, ensure_ascii=False) + "\n"
        (directory / MANIFEST).write_text(text, encoding="utf-8")
    return report(config.out, progress)


def _candidates(config: CuratedConfig, whole: Index) -> Iterator[tuple[str, _Candidate | None]]:
    """(kind, record) of every record of the train split; (why, None) of one that is left out."""
    table = curation.read_table(config.table, config.table_key) if config.table else None
    of_scenes = _of_scenes(config, whole)
    for stream in whole.select("train"):
        for number, shard in enumerate(whole.shards_by_number(stream)):
            if not shard.records:
                continue
            with whole.open(shard) as reader:
                for start in range(0, shard.records, _TOGETHER):
                    positions = range(start, min(start + _TOGETHER, shard.records))
                    for position, record in zip(positions, reader.read(positions)):
                        where = f"{config.path}: {record.source or 'a record'} ({shard.name}[{position}])"
                        try:
                            known = _facts(config, record, table, of_scenes, where)
                        except LensError:
                            if not config.skip_missing:
                                raise
                            yield "without a kind or a score", None
                            continue
                        place = stream.name, number, position
                        yield known.kind, _Candidate(*place, known.scores, tuple(record.captions))


def _facts(config: CuratedConfig, record: Any, table: dict | None, of_scenes: bool, where: str) -> curation.Facts:
    meta = getattr(record, "meta", {})
    kind = curation.scene_kind(meta) if of_scenes else None
    if of_scenes and kind is None:
        raise LensError(f"{where}: no scene of the pictogram world; say with --kind where its kind is")
    if table is None:
        return curation.facts(meta, kind, config.kind or "kind", config.scores, where)
    if record.source not in table:
        raise LensError(f"{where}: {config.table} has no row with {config.table_key} {record.source!r:.80}")
    return curation.facts(table[record.source], kind, config.kind or "kind", config.scores, where)


def _of_scenes(config: CuratedConfig, whole: Index) -> bool:
    """Whether a record's kind is what its scene shows."""
    return whole.source == "openmoji" and not config.kind


def _kinds(config: CuratedConfig, whole: Index) -> tuple[str, ...]:
    return config.kinds or (curation.SCENE_KINDS if _of_scenes(config, whole) else curation.REPORT_KINDS)


def _available(config: CuratedConfig, found: dict[str, list], left_out: Counter[str]) -> dict[str, int]:
    """How many there are of each kind; LensError where there are none of one."""
    available = {kind: len(candidates) for kind, candidates in found.items()}
    if nothing := [kind for kind, count in available.items() if not count]:
        reasons = ", ".join(f"{count} {why}" for why, count in left_out.items()) or "there are no records"
        raise LensError(f"{config.path}: no record of the kinds {', '.join(nothing)} ({reasons}); choose with --kinds")
    return available


def _best(config: CuratedConfig, candidates: list[_Candidate], count: int) -> list[_Candidate]:
    scores = np.array([candidate.scores for candidate in candidates], np.float64).reshape(len(candidates), -1)
    streams = {name: _key(name) for name in {candidate.stream for candidate in candidates}}
    places = np.array([(streams[c.stream], c.shard, c.position) for c in candidates], np.uint64)
    ties = mix(config.seed, _TIES, *places.T)
    return [candidates[row] for row in curation.best(scores, count, ties)]


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _write_index(
    config: CuratedConfig, whole: Index, chosen: dict[str, list[_Candidate]], directory: Path, left_out: Counter[str]
) -> None:
    rows: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    languages: Counter[str] = Counter()
    for candidate in (candidate for candidates in chosen.values() for candidate in candidates):
        rows[candidate.stream][candidate.shard].append(candidate.position)
        languages.update(candidate.languages)
    writer, digests = IndexWriter(directory), {}
    for stream in whole.select("train"):
        if stream.name not in rows:
            continue
        parts = []
        for number, shard in enumerate(whole.shards_by_number(stream)):
            parts.append(np.array(sorted(rows[stream.name].get(number, ())), subset.ROW))
            digest = subset.digest(shard.sha256, parts[-1])
            writer.add(stream.split, stream.bucket, stream.text_class, len(parts[-1]), shard.bytes, digest)
        digests[stream.name] = subset.write(directory / f"{stream.name}.rows", parts)
    kept = "source", "config", "licence", "languages", "holdout_languages", "caption_classes", "caption_count"
    writer.finish(
        whole.buckets,
        captioned={"train": dict(languages)},
        dropped=dict(left_out),
        # From where the set will lie, beside which it is being written. Links are followed first: what is above a
        # folder is not what is above a link to it.
        subset=Subset(os.path.relpath(os.path.realpath(config.path), os.path.realpath(config.out)), whole, digests),
        **{name: getattr(whole, name) for name in kept},
    )


def _write_captions(config: CuratedConfig, chosen: dict[str, list], directory: Path, progress: bool) -> None:
    """A caption of each record, read back through the index that was just written; none of stored features."""
    index = load_index(directory)
    if index.features:
        return
    kinds = {(c.stream, c.shard, c.position): kind for kind, candidates in chosen.items() for c in candidates}
    names = iter(kinds[place] for place in sorted(kinds, key=lambda place: _in_order(index, place)))
    total = sum(stream.records for stream in index.streams)
    with open(directory / CAPTIONS, "w", encoding="utf-8") as file:
        for number, record in enumerate(show_progress(index.records("train"), total, "captions", progress)):
            kind, draw = next(names), mix(config.seed, _CAPTION, number)
            line = {
                "id": f"{'-'.join(kind.split())}/{number:06d}",  # without blanks
                "prompt": choose_caption(record, index.languages, int(draw)),
                "category": kind,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _in_order(index: Index, place: tuple[str, int, int]) -> tuple[int, int, int]:
    """Sorts records as `Index.records` gives them."""
    names = [stream.name for stream in index.streams]
    return names.index(place[0]), *place[1:]


def _manifest(
    config: CuratedConfig, whole: Index, found: dict[str, list], chosen: dict[str, list], left_out: Counter[str]
) -> dict[str, Any]:
    """How many of each kind there were and are, how good, and of what sizes."""
    kinds = {}
    for kind, candidates in chosen.items():
        scores = np.array([candidate.scores for candidate in candidates], np.float64).reshape(len(candidates), -1)
        kinds[kind] = {
            "found": len(found[kind]),
            "chosen": len(candidates),
            "scores": {
                name: {"least": float(column.min()), "mean": float(column.mean())}
                for name, column in zip(config.scores, scores.T)
            },
            "streams": dict(sorted(Counter(candidate.stream for candidate in candidates).items())),
        }
    return {
        "of": config.path,
        "fingerprint": whole.fingerprint,
        "config": plain(config),
        "images": sum(map(len, chosen.values())),
        "kinds": kinds,
        "left_out": dict(left_out),
    }


def _check(config: CuratedConfig, whole: Index) -> None:
    if whole.subset:
        raise LensError(f"{config.path}: a subset itself; give {whole.subset.whole.directory}, which it is of")
    if config.images < 0 or config.seed < 0:
        raise LensError("images and seed must not be negative")
    for name in ("kinds", "scores"):
        given = getattr(config, name)
        if len(set(given)) != len(given):
            raise LensError(f"{name} {' '.join(given)}: one is given twice")
    if config.least and len(config.least) != len(config.scores):
        raise LensError(f"least {config.least}: there are {len(config.scores)} scores, so as many numbers")
    out, source = Path(config.out).resolve(), Path(config.path).resolve()
    if out.is_relative_to(source):
        raise LensError(f"out {config.out}: lies inside the data set that is read; choose a path outside {config.path}")
    if config.table and whole.source == "openmoji":
        raise LensError(f"table {config.table}: records of {config.path} have no sources of their own to look up there")
