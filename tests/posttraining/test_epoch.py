"""Which images an epoch draws: all of them once, in chunks of one size, as the numbers alone say."""

import numpy as np
import pytest

from lens_jax.errors import LensError
from lens_jax.posttraining.epoch import chunks_of, count_chunks, images_of_epoch, levels_of, prompts_of_epoch
from lens_jax.posttraining.nft import NftConfig, levels


def test_a_pass_has_every_prompt_once():
    """Of 50 prompts 12 an epoch: four epochs are 48 different ones, and the next pass has another order."""
    epochs = [prompts_of_epoch(7, epoch, 12, 50) for epoch in range(8)]
    for first in (0, 4):
        seen = np.concatenate(epochs[first : first + 4])
        assert len(set(seen.tolist())) == 48
    assert not np.array_equal(epochs[0], epochs[4])
    np.testing.assert_array_equal(prompts_of_epoch(7, 3, 12, 50), epochs[3])
    with pytest.raises(LensError, match=r"rollout\.groups is 48, of different prompts; the set has 10"):
        prompts_of_epoch(0, 0, 48, 10)


@pytest.mark.parametrize(("groups", "members", "sizes", "batch"), [(48, 24, 9, 64), (5, 4, 3, 8), (2, 2, 1, 16)])
def test_every_image_is_drawn_once(groups, members, sizes, batch):
    images = images_of_epoch(3, 5, np.arange(100, 100 + groups), members, sizes)
    count = groups * members
    per_size = np.bincount(images.size, minlength=sizes)
    assert per_size.max() - per_size.min() <= 1
    chunks = chunks_of(images, batch)
    drawn = np.concatenate([chunk.images[: chunk.count] for chunk in chunks])
    np.testing.assert_array_equal(np.sort(drawn), np.arange(count))
    for chunk in chunks:
        assert len(chunk.images) == batch
        assert (images.size[chunk.images] == chunk.size).all()
    assert len(chunks) == count_chunks(count, sizes, batch)
    # Another epoch has other sizes for its images, and as many chunks.
    other = images_of_epoch(3, 6, np.arange(groups), members, sizes)
    assert len(chunks_of(other, batch)) == len(chunks)


def test_groups_are_complete_about_in_order():
    """With 9 sizes a group is judged long before the last one is drawn: when 60 % are drawn, some 30 % are complete."""
    images = images_of_epoch(0, 0, np.arange(48), 24, 9)
    chunks = chunks_of(images, 64)
    missing = np.full(48, 24)
    complete = []
    for chunk in chunks:
        np.subtract.at(missing, images.group[chunk.images[: chunk.count]], 1)
        complete.append((missing == 0).sum())
    assert complete[int(0.6 * len(chunks))] >= 0.3 * 48
    assert complete[-1] == 48


def test_levels():
    """Nine of ten steps, different ones for different images, the same at any time."""
    found = levels_of(0, 2, np.arange(1000), 10, 9)
    assert found.shape == (1000, 9)
    assert all(len(set(row)) == 9 for row in found.tolist())
    # Every step is left out about equally often: 100 +- 5 standard deviations of 9.5.
    left_out = np.bincount([45 - sum(row) for row in found.tolist()], minlength=10)
    assert abs(left_out - 100).max() < 48
    np.testing.assert_array_equal(levels_of(0, 2, [17], 10, 9)[0], found[17])
    assert (levels_of(0, 2, np.arange(5), 10, 10).sum(1) == 45).all()


@pytest.mark.parametrize(
    ("timesteps", "noisier", "steps", "expected"),
    [
        (0.99, 1, 10, (10, 9)),
        (0.17, 0.5, 6, (3, 1)),
        (0.5, 1, 6, (6, 3)),
        (0.99, 0.5, 10, (5, 5)),
        (0.01, 0.01, 4, (1, 1)),
    ],
)
def test_the_noisier_levels(timesteps, noisier, steps, expected):
    """The reference's nine of ten; and a level of the noisier half."""
    assert levels(NftConfig(timesteps=timesteps, noisier=noisier), steps) == expected
