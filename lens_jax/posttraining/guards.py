"""What shows that a model has learnt to please its reward instead of drawing better: measures of images alone.

Public runs name the ways in which it happens: a reward for text alone blanks the background (in one run the share of
dark pixels went from 0.45 to 0.93, edges fell by 60 % and colour entropy by 54 %); meshes appear on faces and flat
areas within a few epochs; all images of a prompt become one. Each measure is taken of the same prompts before and
during a run and compared with itself; none has a value that is good for all images.

Images are uint8 [H, W, 3]. Sizes may differ within a list.
"""

from collections.abc import Sequence

import numpy as np

# Of the eight bits of luma: darker than a quarter of white.
_DARK = 64
# Of the luma's gradient, in levels a pixel: more than a soft shade has, less than an outline.
_EDGE = 24.0
# Levels that each colour channel is cut into for the entropy: 512 colours, 9 bits at most.
_LEVELS = 8
# Cells of a side that an image is averaged over before images are compared.
_CELLS = 16
# A difference between neighbours that no eye sees, in levels: keeps flat images from dividing by zero.
_UNSEEN = 0.5


def dark_share(image: np.ndarray) -> float:
    """The share of pixels whose luma is below a quarter of white."""
    return float((_luma(image) < _DARK).mean())


def edge_density(image: np.ndarray) -> float:
    """The share of pixels at which luma changes by more than 24 levels a pixel (central differences)."""
    luma = _luma(image)
    if min(luma.shape) < 3:
        return 0.0
    horizontal = (luma[1:-1, 2:] - luma[1:-1, :-2]) / 2
    vertical = (luma[2:, 1:-1] - luma[:-2, 1:-1]) / 2
    return float((np.hypot(horizontal, vertical) > _EDGE).mean())


def colour_entropy(image: np.ndarray) -> float:
    """Shannon entropy in bits of the colours, each channel cut into 8 levels: 0 of one colour, 9 of all alike often."""
    index = (image // (256 // _LEVELS)).astype(np.int64) @ (_LEVELS**2, _LEVELS, 1)
    share = np.bincount(index.ravel(), minlength=_LEVELS**3) / index.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum()) + 0.0


def blockiness(image: np.ndarray, period: int = 16) -> float:
    """How much a mesh of lines `period` pixels apart stands out: about 1 of an image without, several of one with it.

    The latents are 16 x 16 pixels a token. For each of the `period` places within a block: how much neighbours differ
    there, on average along the line, and of all lines with that place the median, so that a few edges of what is drawn
    count for nothing. The largest of the places is divided by their median. The larger of both directions.
    """
    luma = _luma(image)
    return max(
        _mesh(np.abs(np.diff(luma, axis=1)).mean(0), period), _mesh(np.abs(np.diff(luma, axis=0)).mean(1), period)
    )


def _mesh(differences: np.ndarray, period: int) -> float:
    lines = len(differences) // period
    if lines < 3:  # a median of two is no protection from an edge
        return 1.0
    by_place = np.median(differences[: lines * period].reshape(lines, period), axis=0)
    return float((by_place.max() + _UNSEEN) / (np.median(by_place) + _UNSEEN))


def diversity(images: Sequence[np.ndarray]) -> float:
    """How much the images of one prompt differ: the mean over all pairs of the root mean square difference of their
    colours, in [0, 1], each image averaged to 16 x 16 cells. 0 of copies. NaN of fewer than two images."""
    return mean_pairwise_distance(np.stack([_cells(image) for image in images])) if len(images) > 1 else float("nan")


def mean_pairwise_distance(features: np.ndarray) -> float:
    """The mean over all pairs of the root mean square difference of features [n, d]."""
    values = features.reshape(len(features), -1).astype(np.float64)
    pairs = [np.sqrt(np.square(values[i + 1 :] - values[i]).mean(1)).sum() for i in range(len(values) - 1)]
    return float(sum(pairs) / (len(values) * (len(values) - 1) / 2))


def measure(images: Sequence[np.ndarray], period: int = 16) -> dict[str, float]:
    """The mean of each measure over the images of one prompt, and their diversity where there are two.

    `period` is the side of a token in pixels.
    """
    each = {"dark_share": dark_share, "edge_density": edge_density, "colour_entropy": colour_entropy,
            "blockiness": lambda image: blockiness(image, period)}  # fmt: skip
    values = {name: float(np.mean([function(image) for image in images])) for name, function in each.items()}
    return values | ({"diversity": diversity(images)} if len(images) > 1 else {})


def _luma(image: np.ndarray) -> np.ndarray:
    """Rec. 601, float32 in [0, 255]."""
    return image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def _cells(image: np.ndarray) -> np.ndarray:
    """[16, 16, 3] in [0, 1]: the image averaged over cells. A pixel across a border counts in both by its share."""
    rows, columns = (_averages(side) for side in image.shape[:2])
    return np.einsum("ih,hwc,jw->ijc", rows, image / 255.0, columns, optimize=True)


def _averages(side: int) -> np.ndarray:
    """[16, side]: row i averages over the i-th sixteenth of the side."""
    borders = np.linspace(0, side, _CELLS + 1)
    pixels = np.arange(side)
    overlap = np.minimum(borders[1:, None], pixels + 1) - np.maximum(borders[:-1, None], pixels)
    return np.clip(overlap, 0, None) / (side / _CELLS)
