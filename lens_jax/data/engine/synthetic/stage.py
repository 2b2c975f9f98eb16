"""The stage `synthesize`: a range of numbers to a table of images of text, which the engine then reads as a source."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from lens_jax.data.engine.config import EngineConfig, Source, Thresholds
from lens_jax.data.engine.stage import UnitInput
from lens_jax.data.engine.synthetic import materials
from lens_jax.data.engine.synthetic.draw import SOURCE, synthesize
from lens_jax.data.engine.tables import image_id
from lens_jax.data.engine.unit import Unit, make_unit
from lens_jax.data.records import Record

# Images are large, and a table is in memory as a whole: at most so many a unit.
_ROWS = 500
TABLE = pa.schema(
    [
        pa.field("id", pa.binary(16), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        ("licence", pa.string()),
        # The strings on the image, and of each its font, the font's licence, and left, top, right, bottom in pixels.
        ("text", pa.list_(pa.string())),
        ("fonts", pa.list_(pa.string())),
        ("font_licences", pa.list_(pa.string())),
        ("boxes", pa.list_(pa.list_(pa.int64()))),
        ("background", pa.string()),
        ("engine", pa.string()),
        ("problem", pa.string()),  # null: an image is always made
        ("detail", pa.string()),  # backgrounds that could not be read
    ]
)
META = ("text", "fonts", "font_licences", "boxes", "background", "engine")


class Synthesize:
    """Draws the images of a unit of `units`. Reads no other stage, and of the source nothing."""

    name = "synthesize"
    version = 1
    reads: tuple[str, ...] = ()

    def settings(self, config: EngineConfig) -> Mapping[str, object]:
        given = config.synthetic
        return {
            "style": given.style,
            "seed": given.seed,
            "locales": list(given.locales),
            "shapes": [str(shape) for shape in _shapes(config)],
            "encoding": config.encoding,
            **materials.fingerprint(given),
        }

    def open(self, config: EngineConfig) -> Callable[[UnitInput], pa.Table]:
        loaded = materials.load_materials(config)
        seed = config.synthetic.seed

        def draw(given: UnitInput) -> pa.Table:
            rows = []
            for index in numbers(given.unit, config.synthetic.count):
                rows.append(_row(index, synthesize(seed, index, loaded)))
                given.beat()
            return pa.Table.from_pylist(rows, schema=TABLE)

        return draw


def units(config: EngineConfig) -> list[Unit]:
    """Ranges of numbers that make up `config.synthetic.count`. More images only add units, so that none is made again:
    all but the last stay what they are."""
    rows = _rows(config)
    parts = -(-config.synthetic.count // rows)
    # The number of parts is left out of what a unit is named by; the rows are in it.
    return [make_unit(SOURCE, _path(config, part), part, parts) for part in range(parts)]


def numbers(unit: Unit, count: int) -> range:
    """The numbers of a unit's images."""
    rows = int(unit.path.partition("-")[2].partition("-")[0])
    return range(unit.part * rows, min((unit.part + 1) * rows, count))


def source(folder: str | Path, weight: float = 1.0) -> Source:
    """The tables of the stage, which lie in `folder`, as a source: kept captions, and of the nine steps those that
    judge photographs left out, for text on one colour is neither sharp nor rich by their measure."""
    return Source(
        SOURCE,
        "parquet",
        str(folder),
        weight=weight,
        licence="generated",
        caption="keep",
        columns={"image": "image", "text": "caption", "licence": "licence", "meta": " ".join(META)},
        thresholds=Thresholds(
            area=1, nsfw=None, aesthetic=None, watermark=None, laplacian=None, entropy=None, luminance=None
        ),
    )


def records(table: pa.Table) -> Iterator[Record]:
    """The images of a table as they are packed, with what is written on them in `meta`."""
    for row in table.to_pylist():
        yield Record(
            image=row["image"],
            captions={"en": (row["caption"],)},
            height=row["height"],
            width=row["width"],
            source=f"{SOURCE}/{row['key']}",
            licence=row["licence"] or "",
            meta={"id": row["id"].hex(), "key": row["key"], **{name: row[name] for name in META}},
        )


def _row(index: int, record: Record) -> dict[str, object]:
    key = f"{index:012d}"
    return {
        "id": image_id(SOURCE, key),
        "index": index,
        "key": key,
        "image": record.image,
        "height": record.height,
        "width": record.width,
        "caption": record.captions["en"][0],
        "licence": record.licence,
        **{name: record.meta[name] for name in META},
        "detail": "; ".join(record.meta["problems"]) or None,
    }


def _rows(config: EngineConfig) -> int:
    return min(config.unit_rows, _ROWS)


def _path(config: EngineConfig, part: int) -> str:
    # A last unit that is not full has another name than the full one that it becomes with a larger count.
    rows = _rows(config)
    made = min((part + 1) * rows, config.synthetic.count) - part * rows
    return f"numbers-{rows}-{made}"


def _shapes(config: EngineConfig):
    from lens_jax.data.buckets import parse_buckets

    return materials.shapes(config.synthetic.size, parse_buckets(config.buckets))
