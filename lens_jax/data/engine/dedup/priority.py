"""The order in which of several duplicates one is kept, as byte strings that sort by it.

A key names an image and its priority at once, needs no table to be compared, and is the same wherever it is made. The
lowest key comes first. Keys are numpy strings of a fixed number of bytes; the last 16 are the id of the image.
"""

from collections.abc import Mapping

import numpy as np

ID_BYTES = 16
# What a key may begin with, and the bytes it takes.
_WIDTHS = {"aesthetic": 4, "area": 8, "id": ID_BYTES}


def key_bytes(order: tuple[str, ...]) -> int:
    """The length of a key."""
    return sum(_WIDTHS[name] for name in order)


def make_keys(order: tuple[str, ...], columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Keys [n] of `key_bytes(order)` bytes.

    `columns` has what `order` names: `aesthetic` float32 [n] and `area` int64 [n], of which more comes first and NaN or
    a negative area last, and `id` uint8 [n, 16], of which the lower comes first.
    """
    parts = [_PARTS[name](columns[name]) for name in order]
    return as_keys(np.concatenate(parts, 1))


def as_keys(values: np.ndarray) -> np.ndarray:
    """Bytes uint8 [n, width] as keys [n]."""
    values = np.ascontiguousarray(values, np.uint8)
    return values.view(f"S{values.shape[1]}").reshape(len(values))


def as_bytes(keys: np.ndarray) -> np.ndarray:
    """Keys [n] as bytes uint8 [n, width]; numpy drops the zeros at the end of a key that is taken out of the array."""
    return np.ascontiguousarray(keys).view(np.uint8).reshape(len(keys), keys.dtype.itemsize)


def ids(keys: np.ndarray) -> np.ndarray:
    """The ids uint8 [n, 16] in keys."""
    return as_bytes(keys)[:, -ID_BYTES:]


def part_of(keys: np.ndarray, parts: int) -> np.ndarray:
    """A number int64 [n] below `parts` for each key, which depends on its id alone and is spread evenly."""
    return (mixed(keys, 0) % np.uint64(parts)).astype(np.int64)


def mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """Pseudo-random numbers uint64 [n], of the ids and a seed."""
    halves = np.ascontiguousarray(ids(keys)).view("<u8")
    x = halves[:, 0] ^ _scramble(halves[:, 1] + np.uint64(seed % 2**64))
    return _scramble(x)


def _scramble(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a permutation of 64-bit numbers in which each bit depends on all."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _aesthetic(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float32) + np.float32(0)  # -0.0 is 0.0
    bits = values.view(np.uint32)
    # Bits of floats sort as numbers do, once those of negative ones are turned around.
    rising = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    falling = np.where(np.isnan(values), np.uint32(0xFFFFFFFF), ~rising)
    return falling.astype(">u4").view(np.uint8).reshape(len(values), 4)


def _area(values: np.ndarray) -> np.ndarray:
    values = np.maximum(np.asarray(values, np.int64), -1)
    falling = np.uint64(2**63 - 1) - values.astype(np.uint64)  # -1 wraps around to the highest of all
    return falling.astype(">u8").view(np.uint8).reshape(len(values), 8)


def _id(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.uint8).reshape(len(values), ID_BYTES)


_PARTS = {"aesthetic": _aesthetic, "area": _area, "id": _id}
