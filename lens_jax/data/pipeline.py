"""Batches of one bucket, a pure function of (data set, seed, step).

Which records make batch `step` is index arithmetic, so resuming needs no more than the step, every host finds its
rows without talking to the others, and all hosts agree on the bucket (a compiled step has one shape). grain adds what
it is good at: reading ahead in threads.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lens_jax.data import feature_records, records
from lens_jax.data.buckets import Bucket, areas, parse_buckets
from lens_jax.data.manifest import NAME, Manifest, load_manifest
from lens_jax.data.permutation import mix, permute
from lens_jax.data.shards import ShardReader
from lens_jax.errors import LensError, nearest

# grain wants a length; at a thousand steps a second this one lasts 35 years.
ENDLESS = 1 << 40
# Separate the uses of one seed.
_ORDER, _EPOCH, _CAPTION = 1, 2, 3


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    # Directory of a prepared data set.
    path: str = "data/openmoji"
    # Buckets the data set must have, as `prepare --buckets` takes them; () takes what it has.
    buckets: tuple[str, ...] = ()
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
    # Threads that read and decode; 0 reads in the training thread.
    threads: int = 2
    # Batches kept ready.
    prefetch: int = 4


@dataclass(frozen=True)
class BatchPlan:
    """Which records make up the batch of a step.

    Training runs through cycles. In a cycle bucket b has its share of steps, round(records / batch size * weight) and
    at least one, in an order shuffled anew each cycle. The k-th batch of a bucket is the k-th window of that bucket's
    stream: permutation after permutation of its records. So within an epoch of a bucket no record is lost or repeated,
    and a bucket smaller than a batch is used too.
    """

    # Records of each bucket; buckets without any are skipped.
    counts: tuple[int, ...]
    # Records a batch of each bucket, over all hosts; a number is for all of them.
    batch_size: int | tuple[int, ...]
    # Seed of the order.
    seed: int
    # How often each bucket is used relative to its number of records; () means all 1.
    weights: tuple[float, ...] = ()

    def __post_init__(self):
        if min(self.batch_sizes) < 1 or len(self.batch_sizes) != len(self.counts):
            raise LensError(f"batch_size {self.batch_size}: one number of at least 1, or one for each bucket")
        if self.seed < 0:
            raise LensError(f"seed {self.seed}: must not be negative")
        if not any(self.counts):
            raise LensError("no records to make batches of")
        if self.weights and (len(self.weights) != len(self.counts) or min(self.weights) < 0):
            raise LensError(f"weights: needs {len(self.counts)} numbers, one a bucket, none negative")
        if not sum(self.batches):
            raise LensError("weights: at least one bucket with records needs a weight above 0")

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Records a batch of each bucket."""
        return self.batch_size if isinstance(self.batch_size, tuple) else (self.batch_size,) * len(self.counts)

    @property
    def batches(self) -> tuple[int, ...]:
        """Batches of each bucket in a cycle."""
        weights = self.weights or (1.0,) * len(self.counts)
        return tuple(
            max(1, round(count / size * weight)) if count and weight else 0
            for count, size, weight in zip(self.counts, self.batch_sizes, weights)
        )

    def plan(self, step: int) -> tuple[int, np.ndarray]:
        """(bucket index, positions of the records in that bucket, int64 [B]) of a step."""
        batches = self.batches
        cycle, place = divmod(int(step), sum(batches))
        buckets, ranks = _cycle(batches, self.seed, cycle)
        bucket = int(buckets[place])
        window = cycle * batches[bucket] + int(ranks[place])
        size = self.batch_sizes[bucket]
        return bucket, self._stream(bucket, window * size + np.arange(size))

    def _stream(self, bucket: int, places: np.ndarray) -> np.ndarray:
        """The records at `places` of a bucket's endless stream."""
        count = self.counts[bucket]
        epochs, within = np.divmod(places, count)
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            found[rows] = permute(within[rows], count, self.seed, _EPOCH, bucket, int(epoch))
        return found


@functools.lru_cache(maxsize=4)  # a cycle is as long as an epoch; threads work on this one and the next
def _cycle(batches: tuple[int, ...], seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """(bucket, how many batches of that bucket came before it) for every place of a cycle."""
    total = sum(batches)
    buckets = np.repeat(np.arange(len(batches)), batches)[permute(np.arange(total), total, seed, _ORDER, cycle)]
    ranks = np.empty(total, np.int64)
    for bucket, count in enumerate(batches):
        ranks[buckets == bucket] = np.arange(count)
    return buckets, ranks


class RecordStore:
    """Random access to the records of a split by (bucket index, position). Shards are opened when first needed."""

    def __init__(self, manifest: Manifest, split: str):
        self.manifest = manifest
        self._shards = [manifest.select(split, bucket) for bucket in manifest.buckets]
        self._ends = [np.cumsum([shard.records for shard in shards]) for shards in self._shards]
        self._readers: dict[str, ShardReader] = {}
        self._lock = threading.Lock()

    def _reader(self, bucket: int, index: int) -> ShardReader:
        shard = self._shards[bucket][index]
        with self._lock:
            if shard.name not in self._readers:
                decode = feature_records.decode if self.manifest.features else records.decode
                self._readers[shard.name] = ShardReader(self.manifest.directory / shard.name, shard.records, decode)
            return self._readers[shard.name]

    def read(self, bucket: int, positions: np.ndarray) -> list:
        """The records at `positions` of a bucket, in that order; feature records where the data set is of those."""
        owners = np.searchsorted(self._ends[bucket], positions, side="right")
        found: list = [None] * len(positions)
        for index in np.unique(owners):
            rows = np.flatnonzero(owners == index)
            first = self._ends[bucket][index] - self._shards[bucket][index].records
            for row, record in zip(rows, self._reader(bucket, index).read(positions[rows] - first)):
                found[row] = record
        return found

    def batch(self, bucket: int, positions: np.ndarray, languages: Sequence[str], draws: np.ndarray) -> dict:
        """What the records at `positions` hold; `draws` uint64 [B] choose among their captions.

        `bucket` (H, W), and `pixels` uint8 [B, H, W, 3] and `captions` (B texts), or of a data set of features
        `latents` float32 [B, N, C], `text` (a tuple of [B, T, width]) and `text_lengths` int32 [B].
        """
        size = self.manifest.buckets[bucket]
        found = self.read(bucket, positions)
        for record in found:
            if (record.height, record.width) != (size.height, size.width):
                stored = f"{record.height}x{record.width}"
                raise LensError(f"{record.source}: {stored} in the shards of {size}; prepare the data set again")
        captions = [choose_caption(record, languages, draw) for record, draw in zip(found, draws)]
        batch = {"bucket": (size.height, size.width)}
        if self.manifest.features:
            return batch | _features(self.manifest, found, captions)
        pixels = np.empty((len(found), size.height, size.width, 3), np.uint8)
        for row, record in enumerate(found):
            pixels[row] = records.decode_image(record)
        return batch | {"pixels": pixels, "captions": captions}

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()


def _features(manifest: Manifest, found: list, captions: list[np.ndarray]) -> dict:
    """Latents and padded text features of some records; `captions` [layers, tokens, width] each."""
    made = manifest.features
    shape = (made["layers"], len(found), made["max_tokens"], made["text_width"])
    text = np.zeros(shape, captions[0].dtype)
    for row, (record, caption) in enumerate(zip(found, captions)):
        if caption.shape[::2] != shape[::3] or caption.shape[1] > shape[2]:
            raise LensError(
                f"{record.source}: features {list(caption.shape)} are not what {NAME} says; precompute again"
            )
        text[:, row, : caption.shape[1]] = caption
    return {
        "latents": np.stack([record.latents for record in found]).astype(np.float32),
        "text": tuple(text),
        "text_lengths": np.array([caption.shape[1] for caption in captions], np.int32),
    }


def choose_caption(record, languages: Sequence[str], draw: int):
    """The caption that `draw` (a random 64-bit number) selects: a language both allowed and there, then one of it."""
    present = [language for language in languages if language in record.captions]
    if not present:
        has = ", ".join(record.captions)
        raise LensError(f"{record.source}: no caption in {', '.join(languages)} (it has {has})")
    draw = int(draw)
    texts = record.captions[present[(draw >> 32) % len(present)]]
    return texts[(draw & 0xFFFFFFFF) % len(texts)]


class BatchSource:
    """The batches of a split as a random-access source for grain: `source[step]`.

    `rows` says which rows of a global batch of a size this host reads, as `parallel.rows_of_host` does; None is all.
    """

    def __init__(
        self, manifest: Manifest, split: str, config: DataConfig, rows: Callable[[int], np.ndarray] | None = None
    ):
        self._languages = check_languages(manifest, split, config.languages)
        self._sizes = bucket_sizes(config, manifest.buckets)
        self._rows = rows or np.arange
        self._seed = config.seed
        self._plan = BatchPlan(manifest.counts(split), self._sizes, config.seed)
        self._store = RecordStore(manifest, split)
        for size in self._sizes:
            self._rows(size)  # raises now what the first batch of that bucket would

    def __len__(self) -> int:
        return ENDLESS

    def __repr__(self) -> str:
        return f"BatchSource({self._store.manifest.directory})"

    def __getitem__(self, step: int) -> dict:
        """This host's part of the batch of a step: what `RecordStore.batch` gives, and `step`."""
        bucket, positions = self._plan.plan(step)
        rows = self._rows(self._sizes[bucket])
        draws = mix(self._seed, _CAPTION, int(step), rows)
        return {**self._store.batch(bucket, positions[rows], self._languages, draws), "step": int(step)}


def batches(
    config: DataConfig,
    split: str = "train",
    start_step: int = 0,
    num_steps: int | None = None,
    transform: Callable[[dict], dict] | None = None,
    rows: Callable[[int], np.ndarray] | None = None,
):
    """A grain iterator over the batches from `start_step` on; call its `close()` when done.

    `transform` maps a batch in the reading threads, which is the place to encode its captions. The iterator's state is
    one number, counted from `start_step`: `set_state` on an iterator with the same start continues exactly, and so does
    a new iterator that starts at the next step, which needs no saved state at all.
    """
    import grain

    source = BatchSource(load_manifest(config.path), split, config, rows)
    if start_step < 0 or (num_steps is not None and num_steps < 1):
        raise LensError(f"start_step {start_step}, num_steps {num_steps}: not negative, and at least one step")
    stop = ENDLESS if num_steps is None else start_step + num_steps
    dataset = grain.MapDataset.source(source)[start_step:stop]
    if transform is not None:
        dataset = dataset.map(transform)
    # With fewer slots than threads some threads would idle; without threads there is nothing to buffer.
    slots = max(config.prefetch, config.threads) if config.threads else 0
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=slots)
    return iter(dataset.to_iter_dataset(options))


def validation_batches(
    config: DataConfig,
    split: str = "validation",
    transform: Callable[[dict], dict] | None = None,
    rows: Callable[[int], np.ndarray] | None = None,
) -> Iterator[dict]:
    """Every record of a split exactly once, bucket by bucket, in a fixed order and with the same captions each time.

    As `batches`, with "weight" float32 [B]: the last batch of a bucket is filled up with its first records at weight 0.
    """
    manifest = load_manifest(config.path)
    languages = check_languages(manifest, split, config.languages)
    sizes = bucket_sizes(config, manifest.buckets)
    rows = rows or np.arange
    shares = [(count, size, rows(size)) for count, size in zip(manifest.counts(split), sizes)]
    return _validate(RecordStore(manifest, split), shares, config.seed, languages, transform)


def _validate(store, shares, seed, languages, transform) -> Iterator[dict]:
    step = 0
    try:
        for bucket, (count, size, rows) in enumerate(shares):
            for start in range(0, count, size):
                places = start + rows
                draws = mix(seed, _CAPTION, bucket, places)
                batch = {**store.batch(bucket, places % count, languages, draws), "step": step}
                batch["weight"] = (places < count).astype(np.float32)
                yield transform(batch) if transform else batch
                step += 1
    finally:
        store.close()


def bucket_sizes(config: DataConfig, buckets: Sequence[Bucket]) -> tuple[int, ...]:
    """Images a batch of each bucket."""
    if min(config.batch_sizes or (config.batch_size,)) < 1:
        raise LensError(f"data.batch_size {config.batch_sizes or config.batch_size}: must be at least 1")
    if not config.batch_sizes:
        return (config.batch_size,) * len(buckets)
    # In pixels: what an area is does not depend on how many of them make a token.
    numbers = areas(buckets, tile=1)
    if len(config.batch_sizes) != max(numbers) + 1:
        raise LensError(
            f"data.batch_sizes {config.batch_sizes}: the data set has {max(numbers) + 1} areas, so as many numbers"
        )
    return tuple(config.batch_sizes[number] for number in numbers)


def check_buckets(config: DataConfig, manifest: Manifest) -> None:
    """LensError where the data set was prepared for other sizes than the run is for."""
    wanted = parse_buckets(config.buckets)
    if wanted and set(wanted) != set(manifest.buckets):
        has = ", ".join(map(str, manifest.buckets[:6])) + (", ..." if len(manifest.buckets) > 6 else "")
        raise LensError(
            f"data.buckets {' '.join(config.buckets)}: {manifest.directory} has {has}; prepare it with --buckets "
            f"{' '.join(config.buckets)}"
        )


def check_languages(manifest: Manifest, split: str, languages: Sequence[str]) -> tuple[str, ...]:
    """`languages`, or those of the train split for (); LensError when they cannot caption every record of `split`."""
    total = sum(manifest.counts(split))
    if not total:
        raise LensError(f"{manifest.directory}: no records in its {split} split; prepare it with some")
    known = manifest.captioned.get(split, {})
    for language in languages:
        if language not in known:
            message = f"language {language!r}: the {split} split of {manifest.directory} has {', '.join(known)}"
            raise LensError(message + nearest(language, known))
    languages = tuple(languages) or manifest.languages
    # Better now than at the first such record, hours into a run.
    reached = sum(known.get(language, 0) for language in languages)
    if reached < total:
        chosen = ", ".join(languages)
        raise LensError(f"languages {chosen}: at most {reached} of the {total} {split} records have such captions")
    return languages
