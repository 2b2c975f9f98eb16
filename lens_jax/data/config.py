"""What to train on, as a config."""

import math
from dataclasses import dataclass
from typing import Literal

from lens_jax.errors import LensError


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    # Directory of a prepared data set, or the mixture.json of several.
    path: str = "data/openmoji"
    # Several data sets, in place of `path`: all of images, or all of features of the same networks.
    sources: tuple[str, ...] = ()
    # How often an image of each source is seen relative to the others'; () is equally often, 0 leaves a source out.
    source_weights: tuple[float, ...] = ()
    # Buckets the data sets must have, as `prepare --buckets` takes them; () takes those they have.
    buckets: tuple[str, ...] = ()
    # Classes of caption lengths the data sets must have, as `prepare` takes them: batches of a class have room for its
    # captions and no more. () takes those they have, which may be none.
    caption_classes: tuple[int, ...] = ()
    # Which batches an image is for: those of the size it is stored at, or of all sizes of its shape that it covers,
    # resized when it is read. A data set prepared at lens-1024 then serves all areas of lens-pretraining.
    areas: Literal["stored", "all"] = "stored"
    # How often a batch is of each area, from the smallest; () is as often as there are images for it. 1 1 1 is the
    # report's three areas equally often.
    area_weights: tuple[float, ...] = ()
    # Images a batch, over all hosts.
    batch_size: int = 64
    # Images a batch by area, from the smallest; () takes batch_size for every bucket. The report's 24, 10 and 6 a
    # device give every area about as many tokens, so that micro-steps take equally long.
    batch_sizes: tuple[int, ...] = ()
    # Pad image tokens to the most that any bucket of the area has: one compiled program an area, not one a bucket.
    pad_areas: bool = False
    # Add room for text until image and text tokens together are a multiple of this. 128 on GPUs and TPUs: their
    # attention kernels work in such blocks, and cuDNN's backward pass has failed on half of one.
    joint_multiple: int = 1
    # Caption languages to draw from, uniformly for each image; () takes all the train split has.
    languages: tuple[str, ...] = ()
    # Seed of the order and of the caption choice.
    seed: int = 0
    # Shards read at a time of what goes into batches of one shape. More are closer to a shuffle of all images, fewer
    # are kinder to an object store.
    shards_together: int = 64
    # Threads that read and decode; 0 reads in the training thread.
    threads: int = 2
    # Batches kept ready.
    prefetch: int = 4

    def __post_init__(self):
        least = {"batch_size": 1, "joint_multiple": 1, "seed": 0, "shards_together": 1, "threads": 0, "prefetch": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise LensError(f"data.{name} is {getattr(self, name)}; it must be at least {number}")
        if self.batch_sizes and min(self.batch_sizes) < 1:
            raise LensError(f"data.batch_sizes {self.batch_sizes}: each must be at least 1")
        for name in ("source_weights", "area_weights"):
            weights = getattr(self, name)
            if weights and not (all(math.isfinite(w) and w >= 0 for w in weights) and any(weights)):
                raise LensError(f"data.{name} {weights}: none may be negative, and one must be above 0")
        if self.source_weights and len(self.source_weights) != len(self.paths):
            raise LensError(f"data.source_weights {self.source_weights}: there are {len(self.paths)} sources")

    @property
    def paths(self) -> tuple[str, ...]:
        """The directories of all data sets."""
        return self.sources or (self.path,)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each of `paths`."""
        return self.source_weights or (1.0,) * len(self.paths)
