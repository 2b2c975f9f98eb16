"""The reading order: every image once an epoch, from few shards at a time, and as good as a shuffle for training."""

import numpy as np

from lens_jax.data.order import ReadingOrder
from lens_jax.data.permutation import permute

RAGGED = np.random.default_rng(0).integers(0, 40, 301)


def test_every_image_once_an_epoch_and_another_order_each():
    order = ReadingOrder(RAGGED, 16, 7)
    count = order.count
    epochs = order.positions(np.arange(3 * count)).reshape(3, count)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))
    assert (epochs[0] == epochs[1]).mean() < 0.01
    # By any way to a place, also backwards over an epoch's end.
    places = np.random.default_rng(1).permutation(3 * count)
    np.testing.assert_array_equal(order.positions(places), epochs.ravel()[places])
    np.testing.assert_array_equal(ReadingOrder(RAGGED, 16, 7).positions(places[:50]), epochs.ravel()[places[:50]])


def test_few_shards_are_one_permutation():
    order = ReadingOrder(RAGGED[:16], 16, 3, 4)
    count = order.count
    np.testing.assert_array_equal(order.positions(np.arange(count)), permute(np.arange(count), count, 3, 4, 2, 0, 0))


def test_literal_numbers():
    """A change here would break the resumption of every run."""
    assert ReadingOrder(np.array([3, 2, 4, 1, 2]), 2, 1, 2).positions(np.arange(14)).tolist() == [
        1,
        2,
        9,
        0,
        6,
        7,
        5,
        4,
        3,
        8,
        11,
        10,
        2,
        0,
    ]


def test_a_batch_touches_few_shards_and_is_random_within_them():
    """512 shards of 50 images, 32 together, batches of 400: the statistics that the docstring of `order` claims."""
    shards, records, together, size = 512, 50, 32, 400
    order, count = ReadingOrder(np.full(shards, records), together, 9), shards * records
    epochs = order.positions(np.arange(2 * count)).reshape(2, count) // records
    batches = epochs.reshape(2, count // size, size)
    touched = [len(np.unique(batch)) for batch in batches.reshape(-1, size)]
    assert max(touched) == together  # a group is four batches, so none lies across a border
    # Two images of one shard: in the same batch as often as in a shuffle of the group.
    pairs = sum((np.bincount(batch) * (np.bincount(batch) - 1)).sum() for batch in batches.reshape(-1, size))
    share = pairs / (2 * shards * records * (records - 1))
    assert abs(share / ((size - 1) / (together * records - 1)) - 1) < 0.02
    # Within a group neighbours are unrelated: of one shard as often as chance has it, and no trend along the place.
    group = epochs[0, : together * records]
    assert abs((group[1:] == group[:-1]).mean() - 1 / together) < 4 * np.sqrt(1 / together / len(group))
    place = np.arange(len(group))
    assert abs(np.corrcoef(place, np.argsort(np.argsort(group)))[0, 1]) < 4 / np.sqrt(len(group))
    # The next epoch has other groups: two shards read together once are so again by chance.
    groups = [np.unique(epoch, return_index=True)[1] // (together * records) for epoch in epochs]
    same = [group[:, None] == group[None, :] for group in groups]
    off = ~np.eye(shards, dtype=bool)
    again = (same[0] & same[1] & off).sum() / (same[0] & off).sum()
    assert abs(again - (together - 1) / (shards - 1)) < 0.01
