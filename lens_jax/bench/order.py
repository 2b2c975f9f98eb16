"""What it costs to say which images come next, of 800 million in 530,000 shards; part of `lens-jax bench data`."""

import time

import numpy as np

from lens_jax.data.buckets import CAPTION_CLASSES, LENS_PRETRAINING
from lens_jax.data.config import DataConfig
from lens_jax.data.datasets import Origin, batch_sizes, make_feeds
from lens_jax.data.index import Stream
from lens_jax.data.mixture import Plan
from lens_jax.data.order import ReadingOrder

SHARDS, RECORDS = 530_000, 1509
BATCH, HOSTS = 3072, 16


def figures(draws: int = 2000) -> dict[str, float]:
    """Milliseconds of a draw, of a new epoch's groups and of a batch's positions; shards that a batch touches."""
    config = DataConfig(areas="all", area_weights=(1, 1, 1), batch_sizes=(1024, 512, 256))
    shapes = [(bucket, bound) for bucket in LENS_PRETRAINING for bound in (*CAPTION_CLASSES, 0)]
    share = SHARDS // len(shapes)
    streams = [(Origin(0, Stream("train", *shape, share * RECORDS, share)), "simulated", 1.0) for shape in shapes]
    feeds, _ = make_feeds(config, streams, LENS_PRETRAINING)
    sizes = batch_sizes(config, LENS_PRETRAINING)
    plan = Plan(feeds, {feed.shape: sizes[feed.shape.bucket] for feed in feeds}, 0)
    draw = _milliseconds(lambda n: plan.draw(n), draws)
    # All in one stream: the longest table there can be.
    order = ReadingOrder(np.full(SHARDS, RECORDS), config.shards_together, 0)
    batch = lambda n: order.positions(np.arange(n * BATCH, (n + 1) * BATCH))
    first, *others = _milliseconds(batch, 100)
    shards = [np.sort(batch(n)) // RECORDS for n in range(100)]
    of_host = [len(np.unique(rows)) for batch in shards for rows in np.split(batch, HOSTS)]
    return {
        "feeds": len(feeds),
        "draw_milliseconds": float(np.median(draw)),
        "draw_milliseconds_mean": float(np.mean(draw)),
        "epoch_milliseconds": first,
        "positions_milliseconds": float(np.median(others)),
        "shards_a_batch": float(np.mean([len(np.unique(batch)) for batch in shards])),
        "shards_a_batch_at_most": max(len(np.unique(batch)) for batch in shards),
        "shards_a_batch_and_host": float(np.mean(of_host)),
    }


def _milliseconds(function, count: int) -> list[float]:
    found = []
    for number in range(count):
        started = time.perf_counter()
        function(number)
        found.append(1e3 * (time.perf_counter() - started))
    return found
