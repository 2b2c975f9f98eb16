"""Guards on constructed images of which the value is known."""

import math

import numpy as np
import pytest

from lens_jax.posttraining import guards


def flat(value, height=64, width=96) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


@pytest.fixture
def natural() -> np.ndarray:
    """Smooth shapes with an outline and a little grain, not aligned with any mesh."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:256, :320]
    image = (
        120
        + 60 * np.sin(x / 37)[..., None] * np.cos(y[..., None] / 29 + np.arange(3))
        + rng.normal(0, 3, (256, 320, 3))
    )
    image[np.hypot(y - 90, x - 130) < 50] -= 60
    return image.clip(0, 255).astype(np.uint8)


def test_dark_share():
    half = flat(255)
    half[:16] = 0
    assert guards.dark_share(half) == 0.25
    assert guards.dark_share(flat(64)) == 0.0
    assert guards.dark_share(flat(63)) == 1.0
    # Pure blue has a luma of 29, pure red of 76.
    assert (guards.dark_share(flat((0, 0, 255))), guards.dark_share(flat((255, 0, 0)))) == (1.0, 0.0)


def test_edge_density():
    """An edge is seen by the columns on either side of it, 2 of the 94 within. A ramp of 23 levels a pixel is none."""
    line = flat(0)
    line[:, 40:] = 255
    assert guards.edge_density(line) == pytest.approx(2 / 94)
    ramp = np.tile(np.arange(10, dtype=np.uint8)[None, :, None], (10, 1, 3))
    assert guards.edge_density(ramp * 23) == 0.0
    assert guards.edge_density(ramp * 25) == 1.0
    assert guards.edge_density(flat(9, 2, 2)) == 0.0


def test_colour_entropy():
    assert guards.colour_entropy(flat(7)) == 0.0
    quarters = flat(0)
    quarters[:32, :48], quarters[32:, :48], quarters[:32, 48:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert guards.colour_entropy(quarters) == 2.0
    levels = np.arange(8) * 32
    every = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(16, 32, 3).astype(np.uint8)
    assert guards.colour_entropy(every) == pytest.approx(9.0, abs=1e-12)
    share = np.array([0.75, 0.25])
    three = flat(0)
    three[:16] = 200
    assert guards.colour_entropy(three) == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-12)


def test_blockiness_sees_a_mesh_and_no_edges(natural):
    clean = guards.blockiness(natural)
    assert 1.0 <= clean < 1.3
    # Blocks of 16 pixels, each a little brighter or darker than its neighbour; and lines at another place.
    rng = np.random.default_rng(1)
    steps = np.kron(rng.choice([-8, 8], (16, 20)), np.ones((16, 16)))[..., None]
    assert guards.blockiness((natural + steps).clip(0, 255).astype(np.uint8)) > 2 * clean
    lines = natural.astype(int)
    lines[:, 5::16] += 12
    assert guards.blockiness(lines.clip(0, 255).astype(np.uint8)) > 2 * clean
    # One hard edge, or a mesh of another period, is none; flat and tiny images are 1.
    edge = flat(0, 256, 256)
    edge[:, 128:] = 255
    assert guards.blockiness(edge) == 1.0
    assert guards.blockiness(flat(9, 8, 8)) == 1.0
    other = flat(100, 256, 256)
    other[:, ::11] = 140
    assert guards.blockiness(other, 16) == 1.0
    # By hand: lines of 40 levels have differences of 40 at two places, and none elsewhere.
    assert guards.blockiness(other, 11) == pytest.approx((40 + 0.5) / 0.5)


def test_diversity_by_hand():
    black, white, half = flat(0), flat(255), flat(0)
    half[:, 48:] = 255
    assert guards.diversity([black, black.copy()]) == 0.0
    assert guards.diversity([black, white]) == pytest.approx(1.0, abs=1e-12)
    # Pairs: 1, and twice the root of a half.
    assert guards.diversity([black, white, half]) == pytest.approx((1 + 2 * math.sqrt(0.5)) / 3)
    # The same scene in another size and shape is the same.
    assert guards.diversity([half, half.repeat(2, 0), half.repeat(3, 1)]) == pytest.approx(0.0, abs=1e-12)
    odd = flat(0, 50, 41)
    assert guards.diversity([odd, flat(255, 17, 93)]) == pytest.approx(1.0)
    assert math.isnan(guards.diversity([black]))


def test_measure_gives_all(natural):
    assert set(guards.measure([natural, natural])) == {
        "dark_share", "edge_density", "colour_entropy", "blockiness", "diversity",
    }  # fmt: skip
    assert "diversity" not in guards.measure([natural])
    assert guards.measure([flat(0), flat(255)])["dark_share"] == 0.5
