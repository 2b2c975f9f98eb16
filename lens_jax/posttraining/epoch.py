"""Which images an epoch draws, in which order: a pure function of seed, epoch and the sizes of things.

An epoch draws `images` members of each of `groups` prompts. Every image has a size of its own, as in the report ("a
group's images at different resolutions"), all sizes equally often. What is drawn at once must have one size, so images
wait in order until a batch of their size is full: groups are then complete about in order too, and can be judged while
the next batches are drawn.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lens_jax.data.permutation import mix
from lens_jax.errors import LensError

# Tags that keep the draws of one purpose from those of another.
_PROMPTS, _SIZES, _LEVELS = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Images:
    """Arrays over the images of an epoch, in the order of groups and members."""

    # The group, from 0, and the image within it.
    group: np.ndarray
    member: np.ndarray
    # Number of the prompt in its set, and of the size among the sizes.
    prompt: np.ndarray
    size: np.ndarray


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What is drawn, and trained on, at once."""

    size: int
    # Numbers of its images in the epoch [batch size]; the last one is repeated to fill it up.
    images: np.ndarray
    # How many of them are no repetition.
    count: int


def prompts_of_epoch(seed: int, epoch: int, groups: int, prompts: int) -> np.ndarray:
    """Numbers of the prompts of an epoch, all different: every pass over the set is in a new order.

    What is left of a set that has no multiple of `groups` has its turn in other passes.
    """
    if not 1 <= groups <= prompts:
        raise LensError(
            f"rollout.groups is {groups}, of different prompts; the set has {prompts}: take at most as many"
        )
    round_, turn = divmod(epoch, prompts // groups)
    order = np.argsort(mix(seed, _PROMPTS, round_, np.arange(prompts)), kind="stable")
    return order[turn * groups : (turn + 1) * groups]


def images_of_epoch(seed: int, epoch: int, prompts: np.ndarray, members: int, sizes: int) -> Images:
    """The images of these prompts, so many each, with every size as often as any other."""
    count = len(prompts) * members
    group, member = np.divmod(np.arange(count), members)
    # As many of each size in every epoch, so that an update always has as many batches.
    size = np.empty(count, np.int64)
    size[np.argsort(mix(seed, _SIZES, epoch, np.arange(count)), kind="stable")] = np.arange(count) % sizes
    return Images(group, member, prompts[group], size)


def chunks_of(images: Images, batch_size: int) -> list[Chunk]:
    """Batches of one size each, in the order in which they are full; what is left over comes last."""
    waiting: dict[int, list[int]] = {}
    found = []
    for number, size in enumerate(images.size.tolist()):
        row = waiting.setdefault(size, [])
        row.append(number)
        if len(row) == batch_size:
            found.append(Chunk(size, np.array(waiting.pop(size)), batch_size))
    for size in sorted(waiting, key=lambda size: waiting[size][0]):
        row = waiting[size]
        filled = np.array(row + row[-1:] * (batch_size - len(row)))
        found.append(Chunk(size, filled, len(row)))
    return found


def count_chunks(images: int, sizes: int, batch_size: int) -> int:
    """Batches of an epoch of so many images."""
    per_size = [len(range(size, images, sizes)) for size in range(sizes)]
    return sum(-(-count // batch_size) for count in per_size)


def levels_of(seed: int, epoch: int, numbers: Sequence[int] | np.ndarray, pool: int, used: int) -> np.ndarray:
    """Which sampling steps an image is trained at, [images, used]: of the first `pool`, in an order of its own."""
    hashes = mix(seed, _LEVELS, epoch, np.asarray(numbers)[:, None], np.arange(pool)[None])
    return np.argsort(hashes, axis=1, kind="stable")[:, :used]
