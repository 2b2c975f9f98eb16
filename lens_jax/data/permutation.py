"""Pseudo-random permutations and draws by integer arithmetic alone.

A run must find the same records after a restart, on another machine, or years later. numpy promises that for its bit
generators but not for `Generator.permutation`, and shuffling a billion positions to read one batch would take
gigabytes. A Feistel network permutes any range point by point, with no memory, and is ten lines that cannot change.
"""

import numpy as np

_ROUNDS = 6


def mix(*values) -> np.ndarray:
    """uint64 hash of integers (or arrays of them, broadcast together); every bit depends on every input."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for value in values:
            state = _finish(state + np.asarray(value).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return state


def _finish(state: np.ndarray) -> np.ndarray:
    # The finaliser of splitmix64 (Steele et al. 2014), a bijection of 64-bit words.
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def permute(index: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Where a random permutation of range(size), chosen by `key`, sends `index`: int64, the shape of `index`."""
    # Halves of fewer than three bits would favour some permutations of a handful of points.
    half = np.uint64(max(3, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = mix(*key, np.arange(_ROUNDS))
    value = np.array(index, np.uint64)
    outside = np.ones(value.shape, bool)
    while outside.any():  # a point that leaves the range goes on until it is back: up to 4 times on average
        left, right = value[outside] >> half, value[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_finish(right + round_key) & mask)
        value[outside] = (left << half) | right
        outside = value >= np.uint64(size)
    return value.astype(np.int64)
