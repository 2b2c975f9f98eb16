"""Batches of images and captions: what `mixture` draws is read, decoded and stacked, ahead of time, in grain's threads.

Every host draws the same batches and reads its own rows of them.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np

from lens_jax.data import images
from lens_jax.data.buckets import Bucket, fit_image
from lens_jax.data.datasets import DataSets
from lens_jax.data.mixture import START, Draw, Plan, Position, check_position
from lens_jax.data.order import ReadingOrder
from lens_jax.data.permutation import mix
from lens_jax.data.reader import RecordReader
from lens_jax.data.records import decode_image
from lens_jax.errors import LensError

# grain wants a length; at a thousand batches a second this one lasts 35 years.
ENDLESS = 1 << 40
# Separate the uses of one seed.
_EPOCH, _CAPTION = 2, 3

# Batch size -> the rows of a batch that this host's devices hold (`parallel.rows_of_host`); None is all rows.
Rows = Callable[[int], np.ndarray] | None


class Batches:
    """An iterator over batches, read ahead. `position` is where a run stands that has taken those given so far."""

    def __init__(self, source: "BatchSource", count: int, transform: Callable[[dict], dict] | None):
        import grain

        config = source.data.config
        self._source, self._taken = source, 0
        self._reading = _Reading(source, transform)
        dataset = grain.MapDataset.source(self._reading)[0:count]
        # With fewer slots than threads some threads would idle; without threads there is nothing to buffer.
        slots = max(config.prefetch, config.threads) if config.threads else 0
        options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=min(slots, count))
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        try:
            batch = next(self._iterator)
        except StopIteration:
            self.close()
            raise
        self._taken += 1
        return batch

    @property
    def position(self) -> Position:
        """Where to go on after the batches that were given; what is read ahead does not count."""
        return self._source.position_after(self._taken)

    def close(self) -> None:
        """Stop reading, and wait for the batches that threads are at."""
        self._iterator.close()
        self._reading.end()
        self._source.close()


class _Reading:
    """What grain's threads do: read a batch and transform it.

    Grain drops what it has not begun when it is closed, and leaves its threads to what they have: they would be at it
    beside whatever comes next in the process, such as the next run.
    """

    def __init__(self, source: "BatchSource", transform: Callable[[dict], dict] | None):
        self._source, self._transform = source, transform
        self._threads, self._ended, self._changed = set(), False, threading.Condition()

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return repr(self._source)

    def __getitem__(self, number: int) -> dict:
        thread = threading.get_ident()
        try:
            with self._changed:
                if self._ended:
                    raise RuntimeError(f"{self!r} is closed")  # nobody waits for this batch any more
                self._threads.add(thread)
            batch = self._source[number]
            return batch if self._transform is None else self._transform(batch)
        finally:
            with self._changed:
                self._threads.discard(thread)
                self._changed.notify_all()

    def end(self) -> None:
        """Begin no further batch, and wait for those that other threads have begun."""
        with self._changed:
            self._ended = True
            self._changed.wait_for(lambda: not self._threads - {threading.get_ident()})


def batches(
    data: DataSets,
    position: Position = START,
    count: int | None = None,
    transform: Callable[[dict], dict] | None = None,
    rows: Rows = None,
) -> Batches:
    """The batches of the train split from a position on: a function of the data, its config and the position alone.

    Each is a dict: `step`, its number in the run; `bucket` (H, W) and `text_class`, its shape; and for this host's rows
    `pixels` uint8 [B, H, W, 3] with `captions` (B texts), or of a data set of features `latents` float32 [B, N, C],
    `text` (a tuple of [B, T, width], T the longest) and `text_lengths` int32 [B]. `transform` maps a batch in the
    reading threads, which is the place to encode its captions.
    """
    return Batches(BatchSource(data, "train", position, rows), ENDLESS if count is None else count, transform)


def validation_batches(
    data: DataSets,
    count: int | None = None,
    transform: Callable[[dict], dict] | None = None,
    rows: Rows = None,
) -> Batches:
    """The images of the validation split, each once for every size it serves; the same batches each time.

    As `batches`, with `weight` float32 [B]: the last batch of a shape is filled up with images at weight 0. Shapes take
    turns by their share of the images, so the first `count` batches are a fair sample of all.
    """
    source = BatchSource(data, "validation", START, rows)
    return Batches(source, len(source) if count is None else min(count, len(source)), transform)


class BatchSource:
    """The batches of a split, by number from a position on, as grain wants them. Safe to share between threads."""

    def __init__(self, data: DataSets, split: str, position: Position = START, rows: Rows = None):
        config, self.data = data.config, data
        self._feeds, self._origins = data.feeds(split)
        self._languages, sizes = data.languages(split), data.sizes(self._feeds)
        if split == "train":
            position = check_position(position, data.fingerprints, data.order, "the run")
        self._plan = Plan(self._feeds, sizes, config.seed, position, once=split != "train")
        self._rows, self._seed, self._weigh = rows or np.arange, config.seed, split != "train"
        for size in set(sizes.values()):
            self._rows(size)  # raises now what the first batch of that size would
        self._orders: dict[int, ReadingOrder] = {}
        self._readers = [RecordReader(index) for index in data.indexes]
        self.position_after = self._plan.position_after

    def __len__(self) -> int:
        return len(self._plan) if self._weigh else ENDLESS

    def __repr__(self) -> str:
        return f"BatchSource({', '.join(self.data.config.paths)})"

    def __getitem__(self, number: int) -> dict:
        """This host's rows of a batch."""
        draw = self._plan.draw(int(number))
        feeds, positions, captions, weight = self._images(draw)
        rows = self._rows(draw.size)
        found = self._read(feeds[rows], positions[rows])
        languages = [self._languages[self._origins[feed].source] for feed in feeds[rows]]
        texts = [choose_caption(*one) for one in zip(found, languages, captions[rows])]
        batch = {"bucket": (draw.shape.bucket.height, draw.shape.bucket.width), "text_class": draw.shape.text_class}
        batch |= _features(found, texts) if self.data.features else {
            "pixels": np.stack([pixels(record, draw.shape.bucket) for record in found]),
            "captions": texts,
        }  # fmt: skip
        return {**batch, **({"weight": weight[rows]} if self._weigh else {}), "step": draw.number}

    def _images(self, draw: Draw) -> tuple[np.ndarray, ...]:
        """(feed, position in its stream, random number for the caption, weight) of every row of a batch.

        Rows are in the order of the shards, so that a host reads from as few as it can; begun at a random one, since
        images of one feed may take longer to read than another's, and hosts should take turns.
        """
        parts = []
        for feed, start, count in draw.parts:
            places = np.arange(start, start + count)
            positions = self._order(feed).positions(places)
            captions = mix(self._seed, _CAPTION, self._feeds[feed].key, places)
            sort = np.argsort(positions, kind="stable")
            parts.append((np.full(count, feed), positions[sort], captions[sort]))
        columns = [np.concatenate(column) for column in zip(*parts)]
        images = len(columns[0])
        rows = np.roll(np.arange(draw.size) % images, draw.random % draw.size)
        weight = np.roll((np.arange(draw.size) < images).astype(np.float32), draw.random % draw.size)
        return *(column[rows] for column in columns), weight

    def _order(self, feed: int) -> ReadingOrder:
        if feed not in self._orders:  # two threads may both make it: they make the same
            source, stream = self._origins[feed]
            counts = self.data.indexes[source].shard_records(stream)
            key = self._seed, _EPOCH, self._feeds[feed].key
            self._orders[feed] = ReadingOrder(counts, self.data.config.shards_together, *key)
        return self._orders[feed]

    def _read(self, feeds: np.ndarray, positions: np.ndarray) -> list:
        """The records of some rows; LensError where one is not of the size that its shard is for."""
        found: list = [None] * len(feeds)
        for feed in np.unique(feeds):
            source, stream = self._origins[feed]
            rows = np.flatnonzero(feeds == feed)
            for row, record in zip(rows, self._readers[source].read(stream, positions[rows])):
                if (record.height, record.width) != (stream.bucket.height, stream.bucket.width):
                    stored = f"{record.height}x{record.width}"
                    message = f"{record.source}: {stored} in the shards of {stream.bucket}; prepare the data set again"
                    raise LensError(message)
                found[row] = record
        return found

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers:
            reader.close()


def pixels(record, bucket: Bucket) -> np.ndarray:
    """uint8 [H, W, 3] of a record's image at a size that it covers: scaled to it, antialiased, and its edge cut off.

    Between the report's areas that edge is at most 2.5 % of one side. JPEG's own reduction would not help: it halves,
    and hardly a side of the smallest area fits twice into one of the largest.
    """
    if (record.height, record.width) == (bucket.height, bucket.width):
        return decode_image(record)
    return fit_image(images.open_image(record.image, record.source or "record"), bucket)


def _features(found: list, captions: list[np.ndarray]) -> dict:
    """Latents and text features of some records, padded to the longest; `captions` [layers, tokens, width] each."""
    lengths = np.array([caption.shape[1] for caption in captions], np.int32)
    layers, _, width = captions[0].shape
    text = np.zeros((layers, len(found), lengths.max(), width), captions[0].dtype)
    for row, (record, caption) in enumerate(zip(found, captions)):
        if caption.shape[::2] != (layers, width):
            raise LensError(f"{record.source}: features {list(caption.shape)} are not the data set's; precompute again")
        text[:, row, : caption.shape[1]] = caption
    latents = np.stack([record.latents for record in found]).astype(np.float32)
    return {"latents": latents, "text": tuple(text), "text_lengths": lengths}


def choose_caption(record, languages: Sequence[str], draw: int):
    """The caption that `draw` (a random 64-bit number) selects: a language both allowed and there, then one of it."""
    present = [language for language in languages if language in record.captions]
    if not present:
        has = ", ".join(record.captions)
        raise LensError(f"{record.source}: no caption in {', '.join(languages)} (it has {has})")
    draw = int(draw)
    texts = record.captions[present[(draw >> 32) % len(present)]]
    return texts[(draw & 0xFFFFFFFF) % len(texts)]
