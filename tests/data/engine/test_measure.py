"""Steps 6 to 8: scores by their closed forms, and the stages probe and measure."""

import io
import itertools
import math

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from lens_jax.data.engine.config import EngineConfig, Source
from lens_jax.data.engine.measure import (
    Measure,
    entropy,
    laplacian_variance,
    luminance,
    measure,
    normalised_grey,
)
from lens_jax.data.engine.probe import Probe
from lens_jax.data.engine.readers import Item, Problem
from lens_jax.data.engine.stage import UnitInput
from lens_jax.data.engine.tables import MEASURE, PROBE, image_id
from lens_jax.data.engine.unit import Unit

SOURCE = Source("web", "folder", "web", licence="CC0")
CONFIG = EngineConfig((SOURCE,))
UNIT = Unit("web-0", "web", "web", 0, 1)


def grey3(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels.astype(np.uint8)[..., None], 3, -1)


def test_laplacian_by_hand():
    rows, columns = np.indices((384, 384))
    board = np.where((rows + columns) % 2, 255, 0).astype(np.uint8)
    # Every neighbour differs by 255, also those mirrored at the border: ±1020, as often the one as the other.
    assert laplacian_variance(board) == pytest.approx(1020**2)
    # A ramp is 0 but at its first and last column, where the neighbour is mirrored: twice its step.
    ramp = np.tile(np.arange(0, 200, 2, dtype=np.uint8), (7, 1))
    expected = np.zeros(100)
    expected[[0, -1]] = 4, -4
    assert laplacian_variance(ramp) == pytest.approx(expected.var())
    point = np.zeros((64, 64), np.uint8)
    point[30, 30] = 100
    assert laplacian_variance(point) == pytest.approx((400**2 + 4 * 100**2) / 64**2)
    assert laplacian_variance(np.full((384, 384), 7, np.uint8)) == 0
    assert laplacian_variance(np.zeros((1, 1), np.uint8)) == 0


@pytest.mark.parametrize("levels", [1, 2, 5, 256])
def test_entropy_of_equal_shares(levels):
    image = (np.arange(levels * 30) % levels).astype(np.uint8).reshape(levels, 30)
    assert entropy(image) == pytest.approx(math.log2(levels), abs=1e-12)
    assert math.copysign(1, entropy(image)) == 1  # not -0


def test_entropy_of_unequal_shares():
    image = np.repeat(np.array([10, 20, 30], np.uint8), (2, 1, 1))[None]
    assert entropy(image) == pytest.approx(1.5)


def test_luminance_is_the_largest_channel_at_full_size():
    pixels = np.zeros((3, 700, 3), np.uint8)
    pixels[0], pixels[1], pixels[2] = (255, 0, 0), (0, 51, 0), (10, 20, 102)
    assert luminance(pixels) == pytest.approx((1 + 0.2 + 0.4) / 3, abs=1e-12)
    noise = np.random.default_rng(0).integers(0, 256, (1100, 701, 3), np.uint8)  # several blocks and a rest
    assert luminance(noise) == pytest.approx(noise.max(-1).mean() / 255, abs=1e-12)
    assert luminance(np.full((1, 1, 3), 255, np.uint8)) == 1


def test_the_resize_is_part_of_clarity():
    """Of area 384² up to rounding in every shape; a whole factor is the mean of its blocks; nothing is done at 384²."""
    for height, width in ((384, 384), (1000, 333), (5000, 40), (20, 9000), (100, 100)):
        grey = normalised_grey(np.zeros((height, width, 3), np.uint8))
        assert 0.9 < grey.size / 384**2 < 1.1
    assert normalised_grey(np.zeros((1, 200_000, 3), np.uint8)).shape == (1, round(200_000 * 384 / 200_000**0.5))
    noise = np.random.default_rng(0).integers(0, 256, (768, 768), np.uint8)
    blocks = noise.reshape(384, 2, 384, 2).astype(float).mean((1, 3))
    np.testing.assert_allclose(normalised_grey(grey3(noise)), blocks, atol=0.5)
    np.testing.assert_array_equal(normalised_grey(grey3(noise[:384, :384])), noise[:384, :384])
    red = np.zeros((384, 384, 3), np.uint8)
    red[..., 0] = 200
    assert (normalised_grey(red) == round(0.299 * 200)).all()


def test_scale_hardly_matters():
    """What the resize is for: the same scene photographed at twice the size is as sharp."""
    rng = np.random.default_rng(0)
    scene = cv2.GaussianBlur(
        cv2.resize(rng.integers(0, 256, (48, 72, 3), np.uint8), (2304, 1536), interpolation=0), (0, 0), 3
    )
    half = cv2.resize(scene, (1152, 768), interpolation=cv2.INTER_AREA)
    assert measure(half).laplacian == pytest.approx(measure(scene).laplacian, rel=0.1)


def photograph() -> np.ndarray:
    """uint8 [600, 800, 3]: discs of all sizes over one another, lit from a corner, with noise."""
    rng = np.random.default_rng(3)
    image = Image.new("RGB", (800, 600), (90, 110, 130))
    draw = ImageDraw.Draw(image)
    for _ in range(800):
        r, x, y = 3 / (1 - rng.uniform()) ** 0.5, rng.uniform(0, 800), rng.uniform(0, 600)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(rng.integers(20, 235, 3).tolist()))
    lit = np.asarray(image) * np.linspace(1.1, 0.7, 800)[:, None] + rng.normal(0, 2, (600, 800, 3))
    return np.clip(lit, 0, 255).astype(np.uint8)


def test_what_the_defaults_keep_and_drop():
    """The ladder of blur falls without a step back; flat, dark and blank images fail one score each, a poster none."""
    photo, limits = photograph(), CONFIG.thresholds
    ladder = [measure(cv2.GaussianBlur(photo, (0, 0), s) if s else photo).laplacian for s in (0, 0.5, 1, 2, 4, 8)]
    assert all(a > b for a, b in itertools.pairwise(ladder)), ladder
    assert ladder[0] > 10 * limits.laplacian
    assert ladder[-1] < limits.laplacian
    poster = Image.new("RGB", (800, 600), "white")
    draw = ImageDraw.Draw(poster)
    for line in range(12):
        draw.text((40, 20 + 48 * line), "SALE of THE WEEK 50 %", fill="black", font_size=44)
    found = measure(np.asarray(poster))
    assert limits.entropy < found.entropy < 3  # what a limit that suits photographs would lose
    assert limits.luminance[0] < found.luminance < limits.luminance[1]
    assert found.laplacian > limits.laplacian
    assert measure(grey3(np.full((600, 800), 128))).entropy < limits.entropy
    assert measure((photo * 0.05).astype(np.uint8)).luminance < limits.luminance[0]
    assert measure(np.full((600, 800, 3), 254, np.uint8)).luminance > limits.luminance[1]
    assert limits.luminance[0] < measure(photo).luminance < limits.luminance[1]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def given(items, **tables) -> UnitInput:
    return UnitInput(UNIT, SOURCE, tables, given=tuple(enumerate(items)))


def test_stages_have_a_row_for_everything():
    good, damaged = png(photograph()[:300, :200]), bytearray(png(photograph()[:300, :200]))
    damaged[-30] ^= 1
    jpeg = io.BytesIO()
    Image.fromarray(photograph()).save(jpeg, "JPEG")
    late = jpeg.getvalue()[:-2] + bytes(range(64)) + jpeg.getvalue()[-2:]  # its header is in order
    items = [
        Item("a", good, {"en": ("one", "two")}, "https://example.org/a", "CC-BY"),
        Problem("b", "cannot be read", "input/output error"),
        Item("c", bytes(damaged)),
        Item("d", b"GIF89a" + bytes(50)),
        Item("e [1].jpg", late),
        Item("f", good),
    ]
    probe = Probe().open(CONFIG)(given(items))
    assert probe.schema == PROBE
    rows = probe.to_pylist()
    assert [row["index"] for row in rows] == list(range(6))
    assert [row["problem"] for row in rows] == [None, "cannot be read", "corrupt data", "format", None, None]
    assert [row["id"] for row in rows] == [image_id("web", item.key) for item in items]
    first = rows[0]
    assert (first["width"], first["height"], first["frames"], first["format"]) == (200, 300, 1, "PNG")
    assert (first["alt_text"], first["licence"]) == ([("en", ["one", "two"])], "CC-BY")
    assert rows[0]["sha256"] == rows[5]["sha256"] != rows[2]["sha256"]
    assert rows[2]["sha256"] is not None  # bytes that are damaged are bytes
    assert rows[5]["licence"] is None

    scores = Measure().open(CONFIG)(given(items, probe=probe))
    assert scores.schema == MEASURE
    rows = scores.to_pylist()
    assert [row["id"] for row in rows] == [image_id("web", item.key) for item in items]
    assert [row["problem"] for row in rows] == [
        None, "cannot be read", "corrupt data", "format", "corrupt data", None,
    ]  # fmt: skip
    expected = measure(photograph()[:300, :200])
    for row in rows:
        found = row["laplacian"], row["entropy"], row["luminance"]
        if row["problem"] is None:
            assert found == pytest.approx((expected.laplacian, expected.entropy, expected.luminance), rel=1e-6)
        else:
            assert found == (None, None, None)


def test_one_that_kills_the_decoder_is_named():
    """Whoever runs the stage gives a Problem in place of an image that ends its process."""
    items = [Item("a", png(photograph()[:100, :100]))]
    probe = Probe().open(CONFIG)(given(items))
    (row,) = Measure().open(CONFIG)(given([Problem("a", "decoder crashed", "signal 11")], probe=probe)).to_pylist()
    assert (row["problem"], row["detail"], row["laplacian"]) == ("decoder crashed", "signal 11", None)


def test_empty_units():
    probe = Probe().open(CONFIG)(given([]))
    assert probe.num_rows == Measure().open(CONFIG)(given([], probe=probe)).num_rows == 0
