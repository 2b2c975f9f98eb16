"""The classical scores of an image: clarity, entropy and luminance (report, section 2, steps 6 to 8).

The stage that stores them is where every image is decoded for the first time.

The report names the scores, and neither their constants nor the thresholds. The definitions here are exact, and the
resize is part of that of clarity: another filter or size moves it by a third.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lens_jax.data.engine.config import EngineConfig
from lens_jax.data.engine.decode import Limits, Undecodable, decode, make_quiet
from lens_jax.data.engine.extra import needed
from lens_jax.data.engine.readers import Item, Problem
from lens_jax.data.engine.stage import UnitInput
from lens_jax.data.engine.tables import MEASURE
from lens_jax.data.engine.threads import in_order

# Clarity and entropy are those of an image of this area: shrunk to 384², the least that is admitted, all are alike.
SIDE = 384
# Pixels whose luminance is taken at a time, so that what lies in between stays in the processor's cache.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Measures:
    """The scores of one image."""

    # Variance of the Laplacian, in squared grey levels.
    laplacian: float
    # Of the grey histogram, 0 to 8 bits.
    entropy: float
    # Mean of HSV's V, 0 to 1.
    luminance: float


def measure(pixels: np.ndarray) -> Measures:
    """The scores of a uint8 [H, W, 3] image."""
    grey = normalised_grey(pixels)
    return Measures(laplacian_variance(grey), entropy(grey), luminance(pixels))


def normalised_grey(pixels: np.ndarray) -> np.ndarray:
    """uint8 [h, w] of the same ratio with h w = 384² up to rounding: BT.601 grey, then the mean of the area of each
    pixel (OpenCV's INTER_AREA)."""
    cv2 = needed("cv2")
    height, width = pixels.shape[:2]
    scale = SIDE / np.sqrt(height * width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA)


def laplacian_variance(grey: np.ndarray) -> float:
    """Variance of the 4-neighbour Laplacian of uint8 [h, w], mirrored at its border without repeating the edge."""
    cv2 = needed("cv2")
    _, deviation = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S, ksize=1))
    return float(deviation[0, 0]) ** 2


def entropy(grey: np.ndarray) -> float:
    """Shannon entropy in bits of the 256 levels of uint8 [h, w]."""
    counts = np.bincount(grey.reshape(-1), minlength=256)
    shares = counts[counts > 0] / grey.size
    return float(abs(np.sum(shares * np.log2(shares))))  # not -sum, which is -0 for one level


def luminance(pixels: np.ndarray) -> float:
    """Mean over all pixels of uint8 [H, W, 3] of max(R, G, B) / 255."""
    cv2 = needed("cv2")
    height, width = pixels.shape[:2]
    rows, total = max(1, _BLOCK // width), 0.0
    for top in range(0, height, rows):
        red, green, blue = cv2.split(pixels[top : top + rows])
        total += cv2.sumElems(cv2.max(cv2.max(red, green), blue))[0]  # exact: whole numbers below 2**53
    return total / (255 * height * width)


class Measure:
    """The stage: decodes every image that `probe` found in order, and stores its scores or why it cannot be decoded."""

    name, version, reads = "measure", 1, ("probe",)

    def settings(self, config: EngineConfig) -> Mapping[str, object]:
        return {"max_pixels": config.max_pixels, "max_bytes": config.max_bytes, "strict_jpeg": config.strict_jpeg}

    def open(self, config: EngineConfig) -> Callable[[UnitInput], "pa.Table"]:  # noqa: F821
        import pyarrow as pa

        limits = Limits(config.max_pixels, config.max_bytes, config.strict_jpeg)
        make_quiet()
        needed("simplejpeg")

        def row(task: tuple[dict[str, object], Item | Problem]) -> dict[str, object]:
            probed, item = task
            if probed["problem"] is not None:
                return {name: probed[name] for name in ("id", "problem", "detail")}
            if isinstance(item, Problem):  # that this stage's decoder died of
                return {"id": probed["id"], "problem": item.reason, "detail": item.detail}
            return {"id": probed["id"], **_scores(item.data, limits)}

        def run(given: UnitInput) -> pa.Table:
            probe = given.tables["probe"].select(["id", "problem", "detail"]).to_pylist()
            tasks = ((probed, item) for probed, (_, item) in zip(probe, given.items()))
            return pa.Table.from_pylist(list(in_order(row, tasks, weigh)), MEASURE)

        return run


def weigh(task: tuple[object, Item | Problem]) -> int:
    """Bytes that a task holds until its turn comes."""
    return 0 if isinstance(task[1], Problem) else len(task[1].data)


def _scores(data: bytes, limits: Limits) -> dict[str, object]:
    try:
        found = measure(decode(data, limits))
    except Undecodable as problem:
        return {"problem": problem.reason, "detail": problem.detail}
    return {"laplacian": found.laplacian, "entropy": found.entropy, "luminance": found.luminance}
