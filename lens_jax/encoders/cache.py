"""What was encoded before, bounded by its bytes."""

import collections

import numpy as np

# What an encoder keeps by default: 131,000 clauses of the sentence encoder, or about 75 prompts of GPT-OSS.
CACHE_BYTES = 256 << 20


class Cache:
    """Arrays by key; the least recently used are given up first. Its owner has a lock where it needs one."""

    def __init__(self, limit: int = CACHE_BYTES):
        self._limit, self._bytes = limit, 0
        self._arrays: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()

    def get(self, key: str) -> np.ndarray | None:
        """The array of a key, or None."""
        if key not in self._arrays:
            return None
        self._arrays.move_to_end(key)
        return self._arrays[key]

    def put(self, key: str, array: np.ndarray) -> None:
        """Keep an array, and give up others for it; one that is larger than all there is room for is not kept."""
        self._bytes += array.nbytes - (self._arrays.pop(key).nbytes if key in self._arrays else 0)
        self._arrays[key] = array
        while self._bytes > self._limit:
            self._bytes -= self._arrays.popitem(last=False)[1].nbytes

    def __len__(self) -> int:
        return len(self._arrays)
