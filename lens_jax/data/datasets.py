"""The data sets of a config, opened and checked, and what they feed into batches."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lens_jax.data.buckets import SAME_SHAPE, Bucket, areas, parse_buckets
from lens_jax.data.config import DataConfig
from lens_jax.data.index import Index, Stream, load_index
from lens_jax.data.mixture import Feed, Shape
from lens_jax.data.mixture_file import resolve
from lens_jax.errors import LensError, nearest

# From what multiple on it is worth a line, and of how many shapes.
_OFTEN, _SAID = 4, 4


class Origin(NamedTuple):
    """Where the images of a feed are."""

    # Number of the data set among those of the config.
    source: int
    stream: Stream


@dataclass(frozen=True)
class DataSets:
    """All data sets of a config; see `open_data`."""

    config: DataConfig
    # In the order of `config.paths`.
    indexes: tuple[Index, ...]
    # Sizes that batches may have.
    buckets: tuple[Bucket, ...]

    @property
    def fingerprints(self) -> dict[str, str]:
        """The path of each data set by its fingerprint."""
        return {index.fingerprint: path for index, path in zip(self.indexes, self.config.paths)}

    @property
    def features(self) -> Mapping[str, Any] | None:
        """What `lens-jax precompute` made the records with; None where they are images and captions."""
        return self.indexes[0].features

    @property
    def order(self) -> dict[str, int]:
        """What the order of reading depends on, besides the data."""
        return {"seed": self.config.seed, "shards_together": self.config.shards_together}

    def feeds(self, split: str) -> tuple[tuple[Feed, ...], tuple[Origin, ...]]:
        """What a split feeds into batches, and from where. In validation only the images count, not the weights."""
        pairs = [
            (Origin(number, stream), index.fingerprint, weight if split == "train" else float(weight > 0))
            for number, (index, weight) in enumerate(zip(self.indexes, self.config.weights))
            for stream in index.streams
            if stream.split == split
        ]
        config = self.config if split == "train" else dataclasses.replace(self.config, area_weights=())
        return make_feeds(config, pairs, self.buckets)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """All shapes that a batch of either split may have."""
        return tuple(sorted({feed.shape for split in ("train", "validation") for feed in self.feeds(split)[0]}))

    def sizes(self, feeds: Iterable[Feed]) -> dict[Shape, int]:
        """Images a batch of every shape."""
        sizes = batch_sizes(self.config, self.buckets)
        return {feed.shape: sizes[feed.shape.bucket] for feed in feeds}

    def languages(self, split: str) -> tuple[tuple[str, ...], ...]:
        """Languages to draw captions from, of each data set."""
        known = list(dict.fromkeys(name for index in self.indexes for name in index.captioned.get(split, {})))
        for name in self.config.languages:
            if name not in known:
                message = f"data.languages {name}: the {split} split of {', '.join(self.config.paths)} has "
                raise LensError(message + ", ".join(known) + nearest(name, known))
        return tuple(
            _languages(index, split, self.config.languages) if weight else ()
            for index, weight in zip(self.indexes, self.config.weights)
        )


def open_data(config: DataConfig, validation: bool = False) -> DataSets:
    """Open the data sets of a config and check all that a run on them, also with `validation`, will ask for.

    LensError in one line for a data set that is not there or not readable; for others than `config.buckets`; for
    languages that do not caption every image; for images beside features; for an empty split; for numbers of batch
    sizes, or weights, other than of areas.
    """
    config = resolve(config)
    indexes = tuple(load_index(path) for path in config.paths)
    _check_kinds(config, indexes)
    _check_classes(config, indexes)
    data = DataSets(config, indexes, _buckets(config, indexes))
    for split in ("train", "validation") if validation else ("train",):
        feeds, _ = data.feeds(split)
        if not any(feed.records and feed.weight for feed in feeds):
            missing = "prepare it with some" + (", or set validation.every 0" if split == "validation" else "")
            raise LensError(f"{', '.join(config.paths)}: no records in the {split} split; {missing}")
        data.sizes(feeds)
        data.languages(split)
    return data


def repetition(data: DataSets) -> str:
    """A line on the images that training repeats in one batch, or shows much more often than others; else empty."""
    feeds = [feed for feed in data.feeds("train")[0] if feed.records and feed.weight]
    sizes = data.sizes(feeds)
    mean = sum(feed.weight for feed in feeds) / sum(feed.records for feed in feeds)
    lines = []
    for shape in sorted({feed.shape for feed in feeds}):
        members = [feed for feed in feeds if feed.shape == shape]
        images, size = sum(feed.records for feed in members), sizes[shape]
        often = max(feed.weight / feed.records for feed in members) / mean
        if images < size or often >= _OFTEN:
            more = f", each shown {often:.3g} times as often as the average image" if often >= _OFTEN else ""
            lines.append(f"{shape} has {images}, a batch {size}{more}")
    if not lines:
        return ""
    rest = f"; and {len(lines) - _SAID} sizes more" if len(lines) > _SAID else ""
    return f"few images, which are repeated often: {'; '.join(lines[:_SAID])}{rest}"


def batch_sizes(config: DataConfig, buckets: Sequence[Bucket]) -> dict[Bucket, int]:
    """Images a batch of each bucket."""
    if not config.batch_sizes:
        return dict.fromkeys(buckets, config.batch_size)
    return dict(zip(buckets, by_area(buckets, config.batch_sizes, "batch_sizes")))


def by_area(buckets: Sequence[Bucket], values: Sequence, name: str) -> list:
    """The value of each bucket's area, of one for each area from the smallest."""
    # In pixels: what an area is does not depend on how many of them make a token.
    numbers = areas(buckets, tile=1)
    if len(values) != max(numbers) + 1:
        raise LensError(f"data.{name} {values}: the buckets have {max(numbers) + 1} areas, so as many numbers")
    return [values[number] for number in numbers]


def serves(stored: Bucket, bucket: Bucket) -> bool:
    """Whether an image stored at one size may be resized to another: of its shape, and not larger."""
    misshape = abs(math.log(stored.width / stored.height) - math.log(bucket.width / bucket.height))
    return misshape <= SAME_SHAPE and bucket.height <= stored.height and bucket.width <= stored.width


def make_feeds(
    config: DataConfig, streams: Sequence[tuple[Origin, str, float]], buckets: Sequence[Bucket]
) -> tuple[tuple[Feed, ...], tuple[Origin, ...]]:
    """The feeds of (origin, name of its data set, weight of an image) into batches of `buckets`, by the config."""
    feeds, origins = [], []
    for origin, name, weight in streams:
        stream = origin.stream
        for bucket in buckets if config.areas == "all" else (stream.bucket,):
            if serves(stream.bucket, bucket):
                target = "" if bucket == stream.bucket else f">{bucket}"
                label = f"{name}/{stream.bucket}/{stream.text_class}{target}"
                shape = Shape(bucket, stream.text_class)
                feeds.append(Feed(label, shape, stream.records, weight * stream.records))
                origins.append(origin)
    if config.area_weights:
        feeds = _weigh_areas(config, feeds, buckets)
    return tuple(feeds), tuple(origins)


def _weigh_areas(config: DataConfig, feeds: list[Feed], buckets: Sequence[Bucket]) -> list[Feed]:
    """Feeds with weights such that batches of the areas are as frequent as the config says."""
    sizes = batch_sizes(config, buckets)
    area = dict(zip(buckets, areas(buckets, tile=1)))
    weights = dict(zip(buckets, by_area(buckets, config.area_weights, "area_weights")))
    total = dict.fromkeys(area.values(), 0.0)
    for feed in feeds:
        total[area[feed.shape.bucket]] += feed.weight
    for number, wanted in enumerate(config.area_weights):
        if wanted and not total[number]:
            raise LensError(f"data.area_weights {config.area_weights}: there are no images for area {number + 1}")
    weigh = lambda bucket: weights[bucket] * sizes[bucket] / (total[area[bucket]] or 1)
    return [dataclasses.replace(feed, weight=feed.weight * weigh(feed.shape.bucket)) for feed in feeds]


def _buckets(config: DataConfig, indexes: Sequence[Index]) -> tuple[Bucket, ...]:
    """Sizes of batches: the wanted ones, which the data sets must have (all areas: cover), or else all there are."""
    wanted = parse_buckets(config.buckets)
    stored = tuple(dict.fromkeys(bucket for index in indexes for bucket in index.buckets))
    if config.areas == "all":
        covered = lambda bucket: any(serves(b, bucket) for b in stored)
        useful = lambda b: any(serves(b, bucket) for bucket in wanted or stored)
    else:
        covered, useful = set(stored).__contains__, set(wanted or stored).__contains__
    if all(map(covered, wanted)) and all(map(useful, stored)):
        return wanted or stored
    has = ", ".join(map(str, stored[:6])) + (", ..." if len(stored) > 6 else "")
    names = " ".join(config.buckets)
    raise LensError(
        f"data.buckets {names}: {', '.join(config.paths)} has {has}; prepare it with --buckets {names}"
        + (", or set data.areas all" if config.areas == "stored" else "")
    )


def _check_classes(config: DataConfig, indexes: Sequence[Index]) -> None:
    for index, path in zip(indexes, config.paths):
        if config.caption_classes and set(index.caption_classes) != set(config.caption_classes):
            wanted, has = (" ".join(map(str, classes)) for classes in (config.caption_classes, index.caption_classes))
            raise LensError(
                f"data.caption_classes {wanted}: {path} has {has or 'none'}; prepare it with --caption-classes {wanted}"
            )


def _check_kinds(config: DataConfig, indexes: Sequence[Index]) -> None:
    """All data sets must be different ones, and of images, or of features that the same networks made."""
    seen: dict[str, str] = {}
    for index, path in zip(indexes, config.paths):
        if index.fingerprint in seen:
            raise LensError(
                f"data.sources: {seen[index.fingerprint]} and {path} are the same data set; weigh it instead"
            )
        seen[index.fingerprint] = path
        first = indexes[0].features
        if (index.features is None) != (first is None):
            raise LensError(f"data.sources: {config.paths[0]} and {path}: images and features cannot be mixed")
        for name in ("codec", "text", "weights", "layers", "text_width", "max_tokens", "fitted") if first else ():
            if index.features.get(name) != first.get(name):
                raise LensError(f"data.sources: the features of {config.paths[0]} and {path} differ in {name}")
    if indexes[0].features and config.areas == "all":
        raise LensError(f"data.areas all: {config.paths[0]} holds latents, which cannot be resized; set it to stored")


def _languages(index: Index, split: str, wanted: Sequence[str]) -> tuple[str, ...]:
    """`wanted` as far as the split has them, or the languages of the train split for (); they must caption it all."""
    total = sum(stream.records for stream in index.streams if stream.split == split)
    known = index.captioned.get(split, {})
    languages = tuple(name for name in wanted if name in known) if wanted else index.languages
    # Better now than at the first such record, hours into a run.
    reached = sum(known.get(name, 0) for name in languages)
    if reached < total:
        raise LensError(
            f"data.languages {', '.join(wanted or languages)}: at most {reached} of the {total} {split} records of "
            f"{index.directory} have such captions; it has {', '.join(known)}"
        )
    return languages
