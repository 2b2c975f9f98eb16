"""Mutated images through all classical steps: no crash, no hang, no row lost, and a reason for every image that is."""

import io
import struct
import time

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from lens_jax.data.engine import select
from lens_jax.data.engine.config import EngineConfig, Models, Source, Thresholds
from lens_jax.data.engine.decode import REASONS
from lens_jax.data.engine.funnel import Funnel
from lens_jax.data.engine.measure import Measure
from lens_jax.data.engine.probe import Probe
from lens_jax.data.engine.readers import Item, Problem
from lens_jax.data.engine.score import Score
from lens_jax.data.engine.stage import UnitInput
from lens_jax.data.engine.tables import KEEP
from lens_jax.data.engine.unit import Unit

SOURCE = Source("web", "folder", "web", thresholds=Thresholds(area=1000, nsfw=None))
CONFIG = EngineConfig((SOURCE,), models=Models(nsfw=""), buckets=("32x32", "64x32", "32x64"))


def seeds() -> list[bytes]:
    """Small images of every kind, so that a mutation mostly hits structure."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    found = []
    for kind, mode, options in (
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True, "exif": turned}),
        ("JPEG", "L", {"restart_marker_blocks": 2}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {"exif": turned}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("WEBP", "RGB", {"exif": turned}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGB", {"save_all": True, "append_images": [image.rotate(90)]}),
        ("PNG", "RGB", {"save_all": True, "append_images": [image.rotate(90)]}),
        ("GIF", "P", {}),
    ):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return found


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes of the kinds that disks, networks and enemies make."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at, size = int(rng.integers(len(data) + 1)), int(rng.integers(1, 40))
        kind = int(rng.integers(7))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at : at + size] = rng.bytes(size)
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + size]
        elif kind == 4:
            data = data[:at]
        elif kind == 5:  # numbers that lie about lengths and sizes
            number = [0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFF, 0x80000000][int(rng.integers(6))]
            data[at : at + 4] = struct.pack(">I" if rng.integers(2) else "<I", number)
        else:
            data[at : at + size] = b"\xff" * size
    return bytes(data)


def through_all_steps(items: list[Item | Problem]) -> list[dict]:
    given, tables = tuple(enumerate(items)), {}
    for stage in (Probe(), Measure(), Score()):
        tables[stage.name] = stage.open(CONFIG)(
            UnitInput(Unit("u", "web", "web", 0, 1), SOURCE, dict(tables), given=given)
        )
    tables["keep"] = pa.Table.from_pylist([{"id": one} for one in tables["probe"]["id"].to_pylist()], KEEP)
    decision = select.decide(CONFIG, SOURCE, tables)
    funnel = Funnel(CONFIG, SOURCE)
    funnel.add(decision)
    assert funnel.images == len(items) == funnel.kept + sum(funnel.dropped.values())
    return [
        {**probe, **measured, **decided}
        for probe, measured, decided in zip(*(t.to_pylist() for t in (tables["probe"], tables["measure"], decision)))
    ]


def check(count: int, seed: int) -> dict[str, int]:
    rng, originals = np.random.default_rng(seed), seeds()
    items: list[Item | Problem] = [Item(f"whole {n}", one) for n, one in enumerate(originals)]
    items += [Item(str(n), mutate(originals[n % len(originals)], rng)) for n in range(count)]
    items.append(Problem("gone", "cannot be read", "input/output error"))
    started = time.process_time()
    rows = through_all_steps(items)
    assert time.process_time() - started < 0.2 * count  # no mutation takes seconds
    assert len(rows) == len(items)
    reasons: dict[str, int] = {}
    for item, row in zip(items, rows):
        assert row["key"] == item.key
        assert row["kept"] == (row["reason"] is None), row
        assert (row["step"] == 1) == (row["problem"] is not None), row
        assert (row["laplacian"] is None) == (row["problem"] is not None), row
        if row["problem"] is not None and isinstance(item, Item):
            assert row["problem"] in REASONS
            assert row["detail"]
        if row["kept"]:
            assert row["width"] * row["height"] >= 1000
        reasons[row["reason"] or "kept"] = reasons.get(row["reason"] or "kept", 0) + 1
    assert all(row["kept"] for row in rows[:11])
    return reasons


def test_no_mutation_is_lost():
    reasons = check(300, 0)
    assert sum(reasons.values()) == 300 + 13
    assert min(reasons[name] for name in ("kept", "truncated", "corrupt data", "format")) > 5


@pytest.mark.slow
def test_no_mutation_of_many_is_lost():
    total: dict[str, int] = {}
    for seed in range(1, 21):
        for reason, count in check(1000, seed).items():
            total[reason] = total.get(reason, 0) + count
    assert {"kept", "truncated", "corrupt data", "format", "bomb"} <= set(total)
