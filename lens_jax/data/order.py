"""The order in which the images of a stream are read: shuffled anew each epoch, and from few shards at a time.

A permutation of all images would open another shard for nearly every image, which no object store serves. So each epoch
shuffles the shards, and shuffles images within groups of so many shards: while a group is read nothing else is, and
with the next epoch every group has other shards.
"""

import threading

import numpy as np

from lens_jax.data.permutation import mix, permute

# Separate the uses of one key.
_SHARDS, _IMAGES = 1, 2
# Epochs whose groups are kept: the one being read and the next.
_EPOCHS = 2


class ReadingOrder:
    """An endless stream of the positions of a stream's images: permutation after permutation. Thread safe.

    `shard_records` int64 [shards] may differ from shard to shard; `together` is the number of shards of a group; `key`,
    a few integers, chooses the permutations. With at most `together` shards an epoch is one permutation of everything.
    """

    def __init__(self, shard_records: np.ndarray, together: int, *key: int):
        self._records = np.asarray(shard_records, np.int64)
        self._starts = np.cumsum(self._records) - self._records
        self._together, self._key = together, key
        self._epochs: dict[int, tuple] = {}
        self._lock = threading.Lock()
        self.count = int(self._records.sum())

    def positions(self, places: np.ndarray) -> np.ndarray:
        """The images at `places` of the endless stream: int64 positions, counted through the shards in their order."""
        epochs, within = np.divmod(np.asarray(places, np.int64), self.count)
        found = np.empty_like(within)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            found[rows] = self._in_epoch(int(epoch), within[rows])
        return found

    def _in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        order, ends, group_ends = self._groups(epoch)
        groups = np.searchsorted(group_ends, places, side="right")
        found = np.empty_like(places)
        for group in np.unique(groups):
            rows = groups == group
            start = int(group_ends[group - 1]) if group else 0
            size = int(group_ends[group]) - start
            shuffled = start + permute(places[rows] - start, size, *self._key, _IMAGES, epoch, int(group))
            ranks = np.searchsorted(ends, shuffled, side="right")
            shards = order[ranks]
            found[rows] = self._starts[shards] + shuffled - (ends[ranks] - self._records[shards])
        return found

    def _groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shards in the epoch's order, images up to the end of each of them, images up to the end of each group)."""
        with self._lock:
            if epoch not in self._epochs:
                shards = len(self._records)
                order = np.arange(shards)
                if shards > self._together:
                    order = np.argsort(mix(*self._key, _SHARDS, epoch, order), kind="stable")
                ends = np.cumsum(self._records[order])
                last = np.minimum(np.arange(self._together, shards + self._together, self._together), shards) - 1
                self._epochs[epoch] = order, ends, ends[last]
                while len(self._epochs) > _EPOCHS:
                    del self._epochs[next(iter(self._epochs))]
            return self._epochs[epoch]
