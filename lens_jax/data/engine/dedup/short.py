"""Short vectors: what rules out nearly every pair for a tenth of the work, and never a duplicate.

A vector x of length 1 is cut into its coordinates p(x) on some axes, orthonormal, and the length q(x) of what is left
of it. For the rest of two vectors Cauchy and Schwarz give

    x.y <= p(x).p(y) + q(x) q(y),

the product of (p(x), q(x)) and (p(y), q(y)), the short vectors. Where that is below the threshold the pair is none, for
any axes; the few others are compared whole. The leading principal axes tell most pairs apart with the fewest numbers.
"""

import numpy as np

# How many axes are tried, as many as the vectors have numbers last.
_TRIED = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Axes that a pair could have for what comparing it whole takes: about 1 us against 0.025 ns an axis, on an AVX2 core.
_WHOLE = 40_000
# Vectors of a sample that axes are made of, and two groups of it whose pairs say how many are needed.
_FITTED, _PAIRED = 1 << 14, 1 << 11
# Added to the square of q, which rounding must not make smaller: squares in float32 are off by a few 1e-7.
_SLACK = 2e-6


def leading_axes(sample: np.ndarray, cosine: float) -> np.ndarray:
    """Axes float32 [D, d], orthonormal columns, for a sample of unit vectors float32 [m, D] in random order."""
    sample = sample[:_FITTED].astype(np.float64)
    centred = sample - sample.mean(0)
    # The sum of all is of no use for telling two apart, so the axes are those of what differs.
    _, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, ::-1].astype(np.float32)
    some = sample[: 2 * _PAIRED].astype(np.float32)
    half = len(some) // 2
    width, best = axes.shape[1], np.inf
    for count in (*(count for count in _TRIED if count < axes.shape[1]), axes.shape[1]):
        short = shorten(axes[:, :count], some)
        share = np.mean(short[:half] @ short[half:].T > cosine) if half else 0.0
        if count + _WHOLE * share < best:
            width, best = count, count + _WHOLE * share
    return np.ascontiguousarray(axes[:, :width])


def shorten(axes: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Unit vectors float32 [n, D] as short ones, float32 [n, d + 1]."""
    inside = vectors @ axes
    rest = np.sqrt(np.maximum(1 - np.einsum("nd,nd->n", inside, inside), 0) + np.float32(_SLACK))
    return np.concatenate([inside, rest[:, None]], axis=1)
