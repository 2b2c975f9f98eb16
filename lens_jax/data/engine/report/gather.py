"""What the page says, gathered from the tables of all units, one unit at a time."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from lens_jax.data.engine.config import EngineConfig
from lens_jax.data.engine.funnel import Funnel
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.report.scores import SCORES
from lens_jax.data.engine.tables import read_table
from lens_jax.data.engine.unit import Unit

# Examples on either side of a threshold, and of each reason without one.
EXAMPLES = 64
# Dropped images of each reason that are named.
NAMED = 1000
# Groups of duplicates that are shown.
GROUPS = 16
# Examples are looked for in so many units, drawn with the seed: each has to be read through to show one of its images.
EXAMPLE_UNITS = 64
# Classes of the histogram of captions, in words.
WORDS = np.array([*range(0, 300, 10), 10**9])


@dataclass(frozen=True, order=True)
class Example:
    """An image to show."""

    # How far its value is from the threshold, which orders examples; then what makes the order one.
    distance: float
    id: bytes
    unit: int
    index: int
    value: float
    key: str


@dataclass(frozen=True)
class Named:
    """A dropped image."""

    source: str
    key: str
    value: float | None
    detail: str


@dataclass
class Gathered:
    """Counts over all units, and what to show of some."""

    funnels: dict[str, Funnel]
    # By the field of the threshold, int64 [bars].
    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    # By (field, bound, "below" or "above"): the closest to the bound.
    examples: dict[tuple[str, float, str], list[Example]] = field(default_factory=dict)
    # Dropped images by reason, the first of each.
    named: dict[str, list[Named]] = field(default_factory=lambda: defaultdict(list))
    # Groups of duplicates: by the kept image, those dropped for it.
    groups: dict[bytes, list[Example]] = field(default_factory=lambda: defaultdict(list))
    kept_of_group: dict[bytes, Example] = field(default_factory=dict)
    # Images by bucket and split.
    buckets: Counter[tuple[str, str]] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    # Captions by kind, int64 [len(WORDS) - 1]; and by what became of the request.
    words: dict[str, np.ndarray] = field(default_factory=dict)
    caption_status: Counter[str] = field(default_factory=Counter)
    usd: float = 0.0
    # Units that have no decision, and in how many units examples were looked for.
    missing: list[Unit] = field(default_factory=list)
    units: int = 0
    looked_at: int = 0


def gather(config: EngineConfig, layout: Layout, units: Sequence[Unit], track=iter) -> Gathered:
    """Everything the page says; `track` shows how far it is."""
    found = Gathered({source.name: Funnel(config, source) for source in config.sources})
    found.histograms = {score.field: np.zeros(len(score.edges) - 1, np.int64) for score in SCORES}
    ready = [unit for unit in units if layout.table("select", unit.id).exists()]
    done = {unit.id for unit in ready}
    found.missing = [unit for unit in units if unit.id not in done]
    found.units = len(ready)
    drawn = np.random.default_rng(config.seed).permutation(len(ready))[:EXAMPLE_UNITS]
    shown = set(drawn.tolist())
    found.looked_at = len(shown)
    for number, unit in track(list(enumerate(ready))):
        tables = _tables(layout, unit)
        _count(found, config, unit, tables)
        if number in shown:
            _pick(found, config, number, unit, tables)
    _trim(found)
    return found


def _tables(layout: Layout, unit: Unit) -> Mapping[str, pa.Table]:
    tables = {}
    for stage in layout.fingerprints:
        path = layout.table(stage, unit.id)
        if stage != "embed" and path.exists():
            tables[stage] = read_table(path)
    return tables


def _count(found: Gathered, config: EngineConfig, unit: Unit, tables: Mapping[str, pa.Table]) -> None:
    source = config.source(unit.source)
    decision = tables["select"]
    found.funnels[unit.source].add(decision)
    for score in SCORES:
        values = score.values(tables)
        found.histograms[score.field] += score.bars(values[np.isfinite(values)])
    details = tables["measure"]["detail"].to_pylist() if "measure" in tables else [None] * decision.num_rows
    probes = tables["probe"].select(["key", "licence", "format"]).to_pylist()
    for row, probe, detail in zip(decision.to_pylist(), probes, details):
        if row["kept"]:
            found.buckets[row["bucket"], row["split"]] += 1
            found.formats[probe["format"]] += 1
            found.licences[probe["licence"] or source.licence] += 1
        elif len(found.named[row["reason"]]) < NAMED:
            found.named[row["reason"]].append(Named(unit.source, probe["key"], row["value"], detail or ""))
    if "caption" in tables:
        for row in tables["caption"].select(["kind", "text", "status", "usd"]).to_pylist():
            found.caption_status[row["status"]] += 1
            found.usd += row["usd"] or 0.0
            if row["text"]:
                bars = found.words.setdefault(row["kind"], np.zeros(len(WORDS) - 1, np.int64))
                bars += np.histogram([len(row["text"].split())], WORDS)[0]
    else:
        kept = tables["probe"]["alt_text"].filter(decision["kept"]).to_pylist()
        bars = found.words.setdefault("as they came", np.zeros(len(WORDS) - 1, np.int64))
        bars += np.histogram(
            [len(text.split()) for texts in kept for _, lines in texts or () for text in lines], WORDS
        )[0]


def _pick(found: Gathered, config: EngineConfig, number: int, unit: Unit, tables: Mapping[str, pa.Table]) -> None:
    """Examples of a unit: the closest to each threshold, failures, duplicates."""
    thresholds = config.thresholds_of(config.source(unit.source))
    ids, keys = tables["probe"]["id"].to_pylist(), tables["probe"]["key"].to_pylist()
    decision = tables["select"]
    step = np.array([value or 0 for value in decision["step"].to_pylist()])
    decodes = step != 1
    example = lambda row, value, distance: Example(float(distance), ids[row], number, int(row), float(value), keys[row])
    for score in SCORES:
        if score.field == "cosine":
            continue
        values = score.values(tables)
        for bound in score.bounds(thresholds):
            distances = np.abs(values - bound)
            if score.logarithmic and bound > 0:
                distances = np.abs(np.log(np.maximum(values, 1e-9) / bound))
            for side, there in (("below", values < bound), ("above", values >= bound)):
                rows = np.flatnonzero(there & decodes & np.isfinite(distances))
                rows = rows[np.argsort(distances[rows], kind="stable")[:EXAMPLES]]
                best = found.examples.setdefault((score.field, bound, side), [])
                best += [example(row, values[row], distances[row]) for row in rows]
                best[:] = heapq.nsmallest(EXAMPLES, best)
    if "keep" in tables:
        cosine = tables["keep"]["cosine"].to_pylist()
        for row, other in enumerate(tables["keep"]["duplicate_of"].to_pylist()):
            if other is not None and step[row] == 9:
                found.groups[other].append(example(row, cosine[row] or np.nan, -(cosine[row] or 0)))
        found.kept_of_group.update({ids[row]: example(row, np.nan, 0) for row in np.flatnonzero(step == 0)})


def _trim(found: Gathered) -> None:
    """Keep the largest groups of duplicates whose kept image can be shown too."""
    whole = [(-len(rest), name) for name, rest in found.groups.items() if name in found.kept_of_group]
    chosen = [name for _, name in sorted(whole)[:GROUPS]]
    found.groups = {name: sorted(found.groups[name])[:8] for name in chosen}
    found.kept_of_group = {name: found.kept_of_group[name] for name in chosen}
