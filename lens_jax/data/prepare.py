"""Make a data set: pictograms composed into scenes, or a folder of captioned images, written as shards by stream."""

import hashlib
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lens_jax.atomic import new_directory
from lens_jax.data import caption_length, images, records
from lens_jax.data.buckets import RATIOS, Bucket, assign, fit_image, make_buckets, parse_buckets
from lens_jax.data.index import NAME
from lens_jax.data.prepare_report import LeftOut, plain, report
from lens_jax.data.prepare_report import progress as show_progress
from lens_jax.data.records import Record, encode
from lens_jax.data.sources import folder, tables
from lens_jax.data.writer import DataWriter
from lens_jax.errors import LensError


@dataclass(frozen=True)
class FolderConfig:
    """A folder of images with captions in text files beside them, metadata.jsonl, .csv or .parquet."""

    # Folder to read, with all folders in it.
    path: str
    # Directory to write; it must not exist yet.
    out: str = "data/folder"
    # Images have about size² pixels (unless `buckets` are given).
    size: int = 512
    # Aspect ratios W:H, one bucket each.
    ratios: tuple[str, ...] = RATIOS
    # Both sides of every bucket are multiples of this many pixels.
    tile: int = 16
    # Instead of size, ratios and tile: sizes HxW, or the report's tables lens-512, lens-768, lens-1024, lens-1440,
    # lens-pretraining (the first three together).
    buckets: tuple[str, ...] = ()
    # Images with a side shorter than this are left out.
    min_side: int = 64
    # Images that would have to be enlarged more than this are left out.
    max_upscale: float = 1.0
    # Share of the images in the validation split, chosen by content, so that duplicates stay together.
    validation: float = 0.02
    # Endings of caption files, photo.txt or photo.png.txt; where an image has several, the first counts.
    caption_files: tuple[str, ...] = folder.CAPTION_FILES
    # Column of a table with the captions. By default text, caption or captions, whichever there is.
    caption_column: str = ""
    # Column of a table with the image's path, from the table's folder.
    file_column: str = "file_name"
    # Follow links to folders, and links that lead out of the folder. Otherwise both are left out.
    follow_links: bool = False
    # Language of captions that name none.
    language: str = "en"
    # Licence of the images, stored with each.
    licence: str = "unspecified"
    # "jpeg", "webp", or "png" (exact).
    encoding: str = "jpeg"
    # Records whose captions are about as long lie together, so that batches of them pad little: the longest of each
    # class in tokens that reach the denoiser, 22 more than the caption's own, such as 64 128 192 256 415. () is for
    # sets that are small beside a batch.
    caption_classes: tuple[int, ...] = ()
    # Folder of the tokenizer.json that counts them. Without one they are estimated, half too long in English.
    tokenizer: str | None = None
    # Write records in a random order, so that reading neighbours of a shard is as good as drawing images.
    shuffle: bool = True
    # A shard is closed when its records reach this many MiB.
    shard_mib: int = 256
    # Threads that decode and resize.
    threads: int = 2
    # Seed of the order and of the choice of the validation split.
    seed: int = 0
    # Stop at the first problem instead of listing it in the index.
    strict: bool = False
    # Replace a data set that is already there.
    overwrite: bool = False


@dataclass(frozen=True)
class _Fitted:
    split: str
    bucket: Bucket
    text_class: int
    entry: bytes
    languages: tuple[str, ...]


@dataclass(frozen=True)
class _Rejected:
    problem: folder.Problem
    bucket: Bucket | None = None


def prepare_folder(
    config: FolderConfig, progress: bool = True, count_tokens: Callable[[str], int] | None = None
) -> Path:
    """Write the data set of a folder to config.out and return that path. Same folder and config, same records.

    `count_tokens` says how many tokens a caption has, from any thread; the command line makes it of config.tokenizer.
    Memory does not grow with the folder.
    """
    buckets = _check_folder(config)
    if config.tokenizer and not count_tokens:
        raise LensError(f"tokenizer {config.tokenizer}: pass a function of it as count_tokens")
    root = folder.root_of(config.path)
    left_out = LeftOut(config.path, config.strict)
    with (
        new_directory(config.out, config.overwrite, NAME) as directory,
        DataWriter(directory, buckets, config.shard_mib << 20) as writer,
        tempfile.TemporaryDirectory(prefix=".listing-", dir=directory) as work,
    ):
        options = folder.Options(_columns(config), config.caption_files, config.follow_links)
        scan = folder.Scan(root, Path(work), options, config.seed if config.shuffle else None)
        total = 0
        for problem in show_progress(scan.look(), None, "looking", progress):
            if problem:
                left_out.add(problem)
            else:
                total += 1
        count = count_tokens or caption_length.estimate
        results = in_threads(lambda item: _fit(item, scan, buckets, config, count), scan.items(), config.threads)
        for result in show_progress(results, total, "fitting", progress):
            if isinstance(result, _Fitted):
                writer.write(result.split, result.bucket, result.text_class, result.entry, result.languages)
            else:
                left_out.add(result.problem, result.bucket)
        if not writer.count("train"):
            raise LensError(f"{config.path}: {left_out.summary(total)}")
        counted_by = "tokenizer" if count_tokens else "estimate"
        writer.finish(
            source="folder",
            config=plain(config),
            licence=config.licence,
            # Of both splits: a language that only validation has must be one that captions are drawn from.
            languages=tuple(sorted({name for counts in writer.captioned().values() for name in counts})),
            holdout_languages=(),
            caption_classes=config.caption_classes,
            caption_count=counted_by if config.caption_classes else "",
            dropped=left_out.reasons,
            dropped_by_bucket=left_out.by_bucket,
            failed=tuple(left_out.named),
        )
    return report(config.out, progress)


def _check_folder(config: FolderConfig) -> tuple[Bucket, ...]:
    if not 0 <= config.validation < 1:
        raise LensError(f"validation {config.validation}: a share from 0 to below 1")
    if not config.max_upscale > 0 or config.min_side < 1 or config.threads < 1:
        raise LensError("max_upscale must be above 0, min_side and threads at least 1")
    if config.shard_mib < 1:
        raise LensError(f"shard_mib {config.shard_mib}: at least 1")
    caption_length.check_classes(config.caption_classes)
    images.encode_image(np.zeros((1, 1, 3), np.uint8), config.encoding)  # refuses an unknown encoding
    if records.text_fault(config.licence) or len(config.licence) > records.MAX_TEXT:
        raise LensError(f"licence {config.licence!r:.40}: a text of at most {records.MAX_TEXT} characters")
    tables.check_columns(_columns(config))
    if not config.caption_files or not all(re.fullmatch(r"(\.\w+)+", ending) for ending in config.caption_files):
        raise LensError(f"caption_files {' '.join(config.caption_files)!r:.80}: endings, such as .txt .caption")
    out, source = Path(config.out).resolve(), Path(config.path).resolve()
    if out.is_relative_to(source):
        raise LensError(f"out {config.out}: lies inside the folder that is read; choose a path outside {config.path}")
    buckets = parse_buckets(config.buckets) or make_buckets(config.size, config.ratios, config.tile)
    side = images.ENCODINGS[config.encoding]
    for bucket in buckets:
        # Or nothing that is written could be read again.
        if bucket.height * bucket.width > images.MAX_PIXELS or max(bucket.height, bucket.width) > side:
            raise LensError(
                f"bucket {bucket}: at most {images.MAX_PIXELS} pixels, and sides of {side} in {config.encoding}"
            )
    return buckets


def _columns(config: FolderConfig) -> tables.Columns:
    return tables.Columns(config.file_column, config.caption_column, config.language)


def _fit(
    item: folder.Found | folder.Problem,
    scan: folder.Scan,
    buckets: Sequence[Bucket],
    config: FolderConfig,
    count_tokens: Callable[[str], int],
) -> _Fitted | _Rejected:
    if isinstance(item, folder.Problem):
        return _Rejected(item)
    captions = scan.captions_of(item)
    if isinstance(captions, folder.Problem):
        return _Rejected(captions)
    try:
        if item.path.stat().st_size > images.MAX_ENCODED_BYTES:
            detail = f"over {images.MAX_ENCODED_BYTES} bytes"
            return _Rejected(folder.Problem(item.name, "cannot be used", detail))
        data = item.path.read_bytes()
        image = images.open_image(data, item.name)
    except LensError as error:
        return _Rejected(folder.Problem(item.name, "cannot be used", str(error).removeprefix(f"{item.name}: ")))
    except OSError as error:
        return _Rejected(folder.Problem(item.name, "cannot be read", str(error.strerror)))
    width, height = image.size
    bucket = None if min(height, width) < config.min_side else assign(height, width, buckets, config.max_upscale)
    if bucket is None:
        detail = f"{height}x{width}; min_side {config.min_side}, max_upscale {config.max_upscale:g}"
        # Counted with the smallest bucket of its shape, the one it came closest to.
        closest = min(buckets, key=lambda b: (abs(np.log(width * b.height / (height * b.width))), b.height * b.width))
        return _Rejected(folder.Problem(item.name, "too small", detail), closest)
    record = Record(
        image=images.encode_image(fit_image(image, bucket), config.encoding),
        captions=captions,
        height=bucket.height,
        width=bucket.width,
        source=item.name,
        licence=config.licence,
        meta={"original_height": height, "original_width": width},
    )
    try:
        entry = encode(record)
    except LensError as error:
        return _Rejected(folder.Problem(item.name, "cannot be stored", str(error).removeprefix(f"{item.name}: ")))
    digest = hashlib.sha256(b"%d:" % config.seed + data).digest()
    held_out = int.from_bytes(digest[:8], "big") < config.validation * 2**64
    most = 0
    if config.caption_classes:
        longest = caption_length.longest(captions.values(), count_tokens)
        most = caption_length.text_class(longest, config.caption_classes)
    return _Fitted("validation" if held_out else "train", bucket, most, entry, tuple(captions))


def in_threads(function, items: Iterable, threads: int) -> Iterator:
    """Results in the order of items; no more than 16 a thread are held."""
    with ThreadPoolExecutor(threads) as pool:
        held = deque()
        try:
            for item in items:
                if len(held) == 16 * threads:
                    yield held.popleft().result()
                held.append(pool.submit(function, item))
            while held:
                yield held.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
