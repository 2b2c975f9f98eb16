"""The stage `probe`: what every item of a unit is, by its header, and the hash of its bytes. Nothing is decoded."""

import hashlib
from collections.abc import Callable, Mapping

from lens_jax.data.engine.config import EngineConfig, Source
from lens_jax.data.engine.decode import Limits, Undecodable, make_quiet, read_header
from lens_jax.data.engine.readers import Item, Problem
from lens_jax.data.engine.stage import UnitInput
from lens_jax.data.engine.tables import PROBE, image_id

# A detail is for reading; some come from the names of files in an archive.
MAX_DETAIL = 300


class Probe:
    """The first stage: the rows that all others follow."""

    name, version, reads = "probe", 1, ()

    def settings(self, config: EngineConfig) -> Mapping[str, object]:
        # The source is named by the unit; another one in the config must not make this one new.
        return {"max_pixels": config.max_pixels, "max_bytes": config.max_bytes}

    def open(self, config: EngineConfig) -> Callable[[UnitInput], "pa.Table"]:  # noqa: F821
        import pyarrow as pa

        make_quiet()
        limits = Limits(config.max_pixels, config.max_bytes, config.strict_jpeg)

        def run(given: UnitInput) -> pa.Table:
            rows = [{"index": index, **probe(given.source, item, limits)} for index, item in given.items()]
            return pa.Table.from_pylist(rows, PROBE)

        return run


def probe(source: Source, item: Item | Problem, limits: Limits) -> dict[str, object]:
    """The row of an item in tables.PROBE, without its index."""
    row: dict[str, object] = {"id": image_id(source.name, item.key), "key": item.key}
    if isinstance(item, Problem):
        return row | {"problem": item.reason, "detail": item.detail[:MAX_DETAIL]}
    row |= {
        "sha256": hashlib.sha256(item.data).digest(),
        "bytes": len(item.data),
        "alt_text": [(language, list(texts)) for language, texts in item.texts.items()],
        "url": item.url or None,
        "licence": item.licence or None,
    }
    try:
        header = read_header(item.data, limits)
    except Undecodable as problem:
        return row | {"problem": problem.reason, "detail": problem.detail[:MAX_DETAIL]}
    return row | {
        "format": header.format,
        "width": header.width,
        "height": header.height,
        "frames": header.frames,
    }
