"""What a run reads: shapes of batches, how often each comes, how long captions are, and what is padding in them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

from lens_jax.data.buckets import Bucket, areas, parse_buckets
from lens_jax.data.caption_length import text_class
from lens_jax.data.config import DataConfig
from lens_jax.data.datasets import Origin, batch_sizes, make_feeds, open_data
from lens_jax.data.index import NAME, Stream
from lens_jax.data.mixture import Shape, batch_shares
from lens_jax.data.mixture_file import resolve
from lens_jax.errors import LensError
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.tokens import Tokens, token_counts

# The report's captions have 109 words on average, about so many tokens of GPT-OSS.
CAPTION_TOKENS = 150
# Their lengths are taken to be log-normal with this standard deviation over the mean: the report has a histogram and no
# number. Between 0.3 and 0.5 the padding of `pretrain_mixed` is the same within half a percent.
_SPREAD = 0.4
_QUANTILES = 2000


@dataclass(frozen=True)
class BucketUse:
    """What a run does with batches of one shape."""

    bucket: Bucket
    # Class of caption lengths; 0 is any.
    text_class: int
    # The area it is of, from the smallest.
    area: int
    # Images a batch over all devices, and their tokens.
    images: int
    tokens: Tokens
    # Of all batches.
    share: float
    # Text tokens of a caption that fill the room, on average.
    text: float


@dataclass(frozen=True)
class DataUse:
    """What a run reads."""

    buckets: tuple[BucketUse, ...]
    # Latents and text features come from the data set, so no encoder is on the devices.
    cached: bool
    # Where the shares are from.
    source: str


def data_use(config: TrainConfig, sequence: int, caption_tokens: int = CAPTION_TOKENS) -> DataUse:
    """From the data sets where they are there, else from `data.buckets`, all of which then have as many images.

    Classes of caption lengths have the shares that captions of so many tokens on average give them.
    """
    data = resolve(config.data) if Path(config.data.path).is_file() else config.data
    lengths = caption_lengths(config, caption_tokens)
    if has_data(data):
        opened = open_data(data)
        feeds, _ = opened.feeds("train")
        buckets, cached = opened.buckets, opened.features is not None
        source = f"batches as {', '.join(data.paths)} gives them"
    else:
        buckets, cached = parse_buckets(data.buckets), False
        feeds = _expected_feeds(data, buckets, lengths) if buckets else ()
        often = "as data.area_weights says" if data.area_weights else "equally often"
        source = f"no data set at {', '.join(data.paths)} yet: all sizes of data.buckets {often}"
    if not feeds:
        raise LensError(
            f"no data set at {', '.join(data.paths)} and no data.buckets; give its sizes, "
            "e.g. --data.buckets lens-pretraining or --data.buckets 512x512"
        )
    sizes = batch_sizes(data, buckets)
    shares = batch_shares(feeds, {feed.shape: sizes[feed.shape.bucket] for feed in feeds})
    return DataUse(_uses(config, sequence, shares, sizes, lengths), cached, source)


def captions_use(config: TrainConfig, buckets: Sequence[Bucket], caption_tokens: int = CAPTION_TOKENS) -> DataUse:
    """Batches of captions alone, all of `data.batch_size` images, of any of these sizes equally often."""
    shares = {Shape(bucket): 1 / len(buckets) for bucket in buckets}
    sizes = dict.fromkeys(buckets, config.data.batch_size)
    found = _uses(config, 1, shares, sizes, caption_lengths(config, caption_tokens))
    return DataUse(found, False, f"captions of {config.captions}, all sizes equally often")


def _uses(
    config: TrainConfig, sequence: int, shares: dict[Shape, float], sizes: dict[Bucket, int], lengths: Sequence[int]
) -> tuple[BucketUse, ...]:
    """Of batches of shapes that come so often; sizes: images a batch of each bucket; lengths: quantiles of captions."""
    tokens, buckets = token_counts(config, tuple(shares), sequence), tuple(sizes)
    of_area = dict(zip(buckets, areas(buckets, tile=1)))
    classes = sorted({shape.text_class for shape in shares} - {0})

    def use(shape: Shape, share: float) -> BucketUse:
        bucket, counts = shape.bucket, tokens[shape]
        mine = [min(n, counts.text) for n in lengths if not classes or text_class(n, classes) == shape.text_class]
        text = sum(mine) / len(mine) if mine else float(min(shape.text_class, counts.text))
        return BucketUse(bucket, shape.text_class, of_area[bucket], sizes[bucket], counts, share, text)

    return tuple(use(shape, share) for shape, share in shares.items())


def has_data(config: DataConfig) -> bool:
    """Whether all data sets of a config are there."""
    return all((Path(path) / NAME).is_file() for path in config.paths)


def caption_lengths(config: TrainConfig, caption_tokens: int) -> list[int]:
    """Quantiles of the text tokens of captions that have so many on average, with those behind every caption."""
    behind, most = config.text.suffix_tokens, config.text.max_tokens
    if not behind or not caption_tokens:  # clauses, of which there are few
        return [min(caption_tokens + behind, most)]
    spread = math.sqrt(math.log(1 + _SPREAD**2))
    normal = NormalDist(math.log(caption_tokens) - spread**2 / 2, spread)
    quantiles = (math.exp(normal.inv_cdf((i + 0.5) / _QUANTILES)) for i in range(_QUANTILES))
    return [min(round(n) + behind, most) for n in quantiles]


def _expected_feeds(data: DataConfig, buckets: Sequence[Bucket], lengths: Sequence[int]):
    """Feeds of a data set that has a million images of every size, their captions of these lengths."""
    shares: dict[int, float] = {}
    for tokens in lengths:
        bound = text_class(tokens, data.caption_classes)
        shares[bound] = shares.get(bound, 0.0) + 1 / len(lengths)
    streams = [
        (Origin(0, Stream("train", bucket, bound, round(1e6 * share), 1)), "expected", 1.0)
        for bucket in buckets
        for bound, share in shares.items()
    ]
    # Every size is taken to have its own images, whichever others they serve too.
    return make_feeds(replace(data, areas="stored"), streams, buckets)[0]


def largest_shapes(uses: Iterable[BucketUse]) -> list[BucketUse]:
    """Of each area the shape with most tokens, which needs most memory."""
    most: dict[int, BucketUse] = {}
    for use in sorted(uses, key=lambda use: (use.tokens.padded + use.tokens.text, use.tokens.image)):
        most[use.area] = use
    return list(most.values())


@dataclass(frozen=True)
class Padding:
    """What is computed for nothing on batches of some shapes; tokens are averages of an image."""

    name: str
    # Of all batches.
    share: float
    images: float
    image_tokens: float
    padded_tokens: float
    text_slots: float
    # Shares of the image tokens, of the text slots, and of both together.
    image_waste: float
    text_waste: float
    waste: float


def padding(config: TrainConfig, uses: Iterable[BucketUse], name: str) -> Padding:
    """Over the tokens of batches of `uses`; dropped captions count as waste."""
    uses = list(uses)
    share = sum(use.share for use in uses)
    images = sum(use.share * use.images for use in uses)
    mean = lambda value: sum(use.share * use.images * value(use) for use in uses) / images
    image, padded = mean(lambda use: use.tokens.image), mean(lambda use: use.tokens.padded)
    text = (1 - config.flow.caption_dropout) * mean(lambda use: use.text)
    slots = mean(lambda use: use.tokens.text)
    waste = 1 - (image + text) / (padded + slots)
    return Padding(name, share, images / share, image, padded, slots, 1 - image / padded, 1 - text / slots, waste)
