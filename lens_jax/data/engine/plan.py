"""`lens-jax data plan`: what a number of images will cost, from a timed sample of the user's own."""

import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich import box
from rich.table import Table
from rich.text import Text

from lens_jax.console import make_console
from lens_jax.data.engine import readers
from lens_jax.data.engine.captions import contract
from lens_jax.data.engine.captions.forecast import Forecast
from lens_jax.data.engine.captions.unit import kinds_of
from lens_jax.data.engine.config import EngineConfig, Source
from lens_jax.data.engine.dedup.task import margin_for
from lens_jax.data.engine.groups import is_captioned
from lens_jax.data.engine.scorers import layout, open_nsfw
from lens_jax.data.engine.select import decide, survivors
from lens_jax.data.engine.stage import UnitInput
from lens_jax.data.engine.stages import MAPS, make_stages
from lens_jax.data.engine.tables import KEEP, write_table
from lens_jax.data.engine.unit import Unit
from lens_jax.data.engine.write import Write
from lens_jax.errors import LensError

# Peak of an H100 in bfloat16, and the share of it that is taken to be reached. Nothing was measured on one.
GPU_FLOPS, GPU_SHARE = 989e12, 0.4
# How often a vector is sent to a cell: of the 100,000 made vectors of `bench dedup`, at two margins.
_COPIES = ((0.2, 2.7), (1.0, 29.0))
# Numbers of a short vector, which rules out most pairs; of CLIP's as of those vectors.
_SHORT = 65
# Units of a source that the sample is taken from.
_UNITS = 4
_CAPTION = {"en": (" ".join(["word"] * 109),)}  # as long as the report's are on average


@dataclass(frozen=True)
class Line:
    """The cost of one part."""

    stage: str
    # Of how many images.
    images: float
    core_hours: float = 0.0
    gpu_hours: float = 0.0
    usd: float = 0.0
    terabytes: float = 0.0
    # "measured here", or what it is derived from.
    basis: str = "measured here"


@dataclass(frozen=True)
class Prices:
    """In any currency; 0 leaves it out."""

    # A core or a GPU for an hour, a terabyte for a month.
    core: float = 0.0
    gpu: float = 0.0
    terabyte: float = 0.0


@dataclass(frozen=True)
class Sample:
    """What was seen of a sample."""

    images: int
    # That decode, that pass steps 1 to 8, and that pass all and have a bucket.
    decoded: int
    kept: int
    # Processor seconds an image of the stage's input, by stage; `write` of an image that is kept.
    cpu_seconds: Mapping[str, float]
    # Bytes an image: of the source, of each stage's table, and of an image as it is stored.
    source_bytes: float
    table_bytes: Mapping[str, float]
    stored_bytes: float
    # What a model is asked of those of the kept images whose captions it writes, and is sent.
    captions: Forecast = field(default_factory=Forecast)


def take_sample(config: EngineConfig, units: Sequence[Unit], images: int) -> Sample:
    """Run the stages over about so many images: of each source as many as it has units, beside the others, and at least
    one of each unit that is looked at."""
    stages = make_stages(config)
    opened = {name: stages[name].open(config) for name in MAPS if name in stages}
    seconds = dict.fromkeys((*opened, "select", "write"), 0.0)
    table_bytes = dict.fromkeys((*opened, "select"), 0.0)
    count = decoded = kept = stored = source_bytes = 0
    captions = Forecast()
    with tempfile.TemporaryDirectory(prefix="lens-jax-plan-") as folder:
        for number, (source, unit, most) in enumerate(_chosen(config, units, images)):
            given, tables = _input(source, unit, most), {}
            source_bytes += sum(len(getattr(item, "data", b"")) for _, item in given)
            for name, run in opened.items():
                part = UnitInput(unit, source, {other: tables[other] for other in stages[name].reads}, given)
                started = time.process_time()
                tables[name] = run(part)
                seconds[name] += time.process_time() - started
                table_bytes[name] += _size(Path(folder) / "table", tables[name])
            started = time.process_time()
            tables["keep"] = _no_duplicates(tables["probe"])
            tables["select"] = decide(config, source, tables)
            seconds["select"] += time.process_time() - started
            table_bytes["select"] += _size(Path(folder) / "table", tables["select"])
            count += len(given)
            decoded += tables["measure"]["problem"].null_count
            passed = survivors(config, source, tables)
            kept += int(np.count_nonzero(passed))
            if is_captioned(config, source.name):
                kinds = kinds_of(config.caption, source)
                for row, yes in zip(tables["probe"].select(["id", "height", "width"]).to_pylist(), passed):
                    if yes:
                        tasks = contract.tasks(config.caption, kinds, row["id"])
                        captions.add(config.caption, tasks, row["height"], row["width"])
            used, size = _write(config, source, unit, number, given, tables, Path(folder))
            seconds["write"] += used
            stored += size
    if not decoded:
        raise LensError(f"none of {count} images of the sample decodes: there is nothing to plan by")
    every = {name: value / (max(kept, 1) if name == "write" else count) for name, value in seconds.items()}
    sizes = {name: value / count for name, value in table_bytes.items()}
    return Sample(count, decoded, kept, every, source_bytes / count, sizes, stored / max(kept, 1), captions)


def cost(config: EngineConfig, sample: Sample, images: float) -> list[Line]:
    """What `images` kept images cost, by part."""
    if not sample.kept:
        raise LensError(f"none of {sample.images} images of the sample is kept: loosen thresholds or buckets first")
    raw = images * sample.images / sample.kept
    admitted = raw * sample.decoded / sample.images
    lines = []
    for name in MAPS:
        if name in sample.cpu_seconds:
            hours, terabytes = sample.cpu_seconds[name] * raw / 3600, sample.table_bytes[name] * raw / 1e12
            basis = "measured here" + (", networks on the processor" if _has_network(config, name) else "")
            lines.append(Line(name, raw, hours, terabytes=terabytes, basis=basis))
    flop = sum(cost for name, cost in network_flop().items() if _on_device(name, getattr(config.models, name)))
    if flop:
        hours = flop * admitted / (GPU_FLOPS * GPU_SHARE) / 3600
        basis = f"in place of the above: {flop / 1e12:.2f} TFLOP an image at {GPU_SHARE:.0%} of an H100, not measured"
        lines.append(Line("networks on GPUs", admitted, gpu_hours=hours, basis=basis))
    lines.append(_duplicates(config, images))
    hours, terabytes = sample.cpu_seconds["select"] * raw / 3600, sample.table_bytes["select"] * raw / 1e12
    lines.append(Line("select", raw, hours, terabytes=terabytes))
    hours, terabytes = sample.cpu_seconds["write"] * images / 3600, sample.stored_bytes * images / 1e12
    lines.append(Line("write", images, hours, terabytes=terabytes))
    if config.caption is not None:
        lines.append(_captions(config, sample, images))
    return lines


def network_flop() -> dict[str, float]:
    """Operations of a forward pass over one image, from the networks' shapes, by the field of Models: spent where their
    step runs."""
    from lens_jax import flops
    from lens_jax.models import eva, vit

    return {
        "embedding": flops.vit_forward(vit.CLIP_L14),
        "aesthetic": flops.vit_forward(vit.SIGLIP_SO400M_384),
        "nsfw": flops.eva_forward(eva.EvaConfig()),
        "watermark": flops.vit_forward(vit.SIGLIP2_BASE_224),
    }


def _on_device(field: str, name: str) -> bool:
    """Whether a field of Models names a network in JAX."""
    return bool(name) and (field, name) not in (("nsfw", open_nsfw.NAME), ("embedding", layout.NAME))


def _has_network(config: EngineConfig, stage: str) -> bool:
    names = {"score": ("nsfw", "aesthetic", "watermark"), "embed": ("embedding",)}.get(stage, ())
    return any(getattr(config.models, name) not in ("", layout.NAME) for name in names)


def _captions(config: EngineConfig, sample: Sample, images: float) -> Line:
    """Of the images of sources that are captioned, as `lens-jax data caption --dry-run` counts them."""
    forecast, factor = sample.captions, images / sample.kept
    usd = forecast.usd(config.caption)
    asked, answered = forecast.tokens_in * factor, forecast.answer_tokens * factor
    basis = f"{asked:.2g} tokens in and {answered:.2g} out of {config.caption.endpoint.model}"
    if usd is None:
        basis += "; no price: set caption.endpoint.usd_per_million"
    return Line("captions", forecast.images * factor, usd=(usd or 0.0) * factor, basis=basis)


def priced(line: Line, prices: Prices) -> float:
    """What a part costs: its hours at their prices, and what is paid as such."""
    return line.usd + line.core_hours * prices.core + line.gpu_hours * prices.gpu


def show(sample: Sample, lines: Sequence[Line], images: float, prices: Prices) -> None:
    """Print the plan."""
    console = make_console()
    raw = images * sample.images / sample.kept
    console.print(
        f"sample: {sample.images:,} images, {sample.decoded:,} decode, {sample.kept:,} are kept "
        f"({sample.kept / sample.images:.1%}): {images:,.0f} kept images are of {raw:,.0f}"
    )
    console.print("near duplicates are not looked for in a sample, so more images may be needed")
    priced_at_all = any((prices.core, prices.gpu, *(line.usd for line in lines)))
    table = Table("stage", "images", "core-hours", "GPU-hours", "TB", *(["cost"] if priced_at_all else []), "basis")
    table.box = box.SIMPLE
    for line in lines:
        numbers = (f"{line.images:,.0f}", _number(line.core_hours), _number(line.gpu_hours), _number(line.terabytes))
        cost = [f"{priced(line, prices):,.0f}"] if priced_at_all else []
        table.add_row(line.stage, *numbers, *cost, Text(line.basis))
    totals = (_number(sum(getattr(line, name) for line in lines)) for name in ("core_hours", "gpu_hours", "terabytes"))
    total = [f"{sum(priced(line, prices) for line in lines):,.0f}"] if priced_at_all else []
    table.add_row("all", "", *totals, *total, "")
    console.print(table)
    console.print(f"the sources: {sample.source_bytes * raw / 1e12:,.3g} TB")
    if prices.terabyte:
        stored = sum(line.terabytes for line in lines if line.stage != "duplicates")
        console.print(f"what is stored costs {stored * prices.terabyte:,.0f} a month")


def to_json(sample: Sample, lines: Sequence[Line], prices: Prices) -> dict[str, object]:
    """The plan as plain values."""
    parts = [dataclasses.asdict(line) | {"cost": priced(line, prices)} for line in lines]
    return {"sample": dataclasses.asdict(sample), "parts": parts}


def _number(value: float) -> str:
    return "" if not value else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _duplicates(config: EngineConfig, images: float) -> Line:
    """From the operations of the search and the speed of a matrix product here."""
    if not config.models.embedding:
        return Line("duplicates", images, basis="copies of the same bytes alone: seconds")
    cells = config.dedup.centroids or max(1, round(math.sqrt(images)))
    margin = margin_for(images) if config.dedup.margin is None else config.dedup.margin
    copies = next((copies for most, copies in _COPIES if margin <= most), _COPIES[-1][1])
    width = layout.load().width if config.models.embedding == layout.NAME else 768
    flop = 2 * images * (width * cells + min(_SHORT, width) * copies * images / cells)
    speed = _matrix_speed()
    basis = (
        f"{flop:.1e} operations at {speed / 1e9:.0f} GFLOP/s a core, measured here; vectors sent {copies:g} times, as "
        "made ones are: yours may be fewer"
    )
    return Line("duplicates", images, flop / speed / 3600, terabytes=copies * 2 * width * images / 1e12, basis=basis)


def _matrix_speed() -> float:
    """Operations a processor second of a float32 matrix product."""
    a = np.ones((512, 768), np.float32)
    a @ a.T  # threads start
    started, count = time.process_time(), 0
    while time.process_time() - started < 0.2:
        a @ a.T
        count += 1
    return count * 2 * 512 * 512 * 768 / (time.process_time() - started)


def _chosen(config: EngineConfig, units: Sequence[Unit], images: int) -> Iterator[tuple[Source, Unit, int]]:
    """(source, unit, how many of its images) of the sample."""
    for source in config.sources:
        mine = [unit for unit in units if unit.source == source.name]
        places = sorted({round(i * (len(mine) - 1) / max(_UNITS - 1, 1)) for i in range(_UNITS)}) if mine else []
        for place in places:
            yield source, mine[place], max(1, round(images * len(mine) / (len(units) * len(places))))


def _input(source: Source, unit: Unit, most: int) -> tuple[tuple[int, readers.Item | readers.Problem], ...]:
    return tuple(enumerate(itertools.islice(readers.read(source, unit), most)))


def _no_duplicates(probe: pa.Table) -> pa.Table:
    rows = probe.num_rows
    null = [pa.nulls(rows, field.type) for field in KEEP][1:]
    return pa.table([probe["id"], *null], schema=KEEP)


def _size(path: Path, table: pa.Table) -> int:
    write_table(path, table)
    return path.stat().st_size


def _write(config, source, unit, number, given, tables, folder) -> tuple[float, int]:
    """(processor seconds, bytes) of storing what is kept, each image with a caption, whoever would write it."""
    captioned = tuple(
        (index, dataclasses.replace(item, texts=item.texts or _CAPTION) if isinstance(item, readers.Item) else item)
        for index, item in given
    )
    sources = tuple(dataclasses.replace(s, caption="keep") for s in config.sources)
    out = folder / f"out{number}"
    plain = dataclasses.replace(config, sources=sources, out=str(out), caption=None)
    run = Write(captioned=False).open(plain)
    started = time.process_time()
    run(unit, [UnitInput(unit, plain.source(source.name), tables, captioned)])
    seconds = time.process_time() - started
    return seconds, sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
