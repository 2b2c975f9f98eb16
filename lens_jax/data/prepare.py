"""Make a data set: pictograms composed into scenes, or a folder of captioned images, written as shards by stream."""

import hashlib
import json
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lens_jax.atomic import new_directory
from lens_jax.data import caption_length, images, phrases, records, scenes
from lens_jax.data.buckets import RATIOS, Bucket, assign, fit_image, make_buckets, parse_buckets
from lens_jax.data.index import NAME, SPLITS
from lens_jax.data.prepare_report import LeftOut, plain, report
from lens_jax.data.prepare_report import progress as show_progress
from lens_jax.data.records import Record, encode
from lens_jax.data.sources import folder, openmoji, tables
from lens_jax.data.writer import DataWriter
from lens_jax.errors import LensError, nearest


@dataclass(frozen=True)
class OpenMojiConfig:
    """Pictograms, alone and composed into scenes, captioned in up to twelve languages."""

    # Directory to write; it must not exist yet.
    out: str = "data/openmoji"
    # How many concepts (1 to 80), the most distinct first.
    concepts: int = 64
    # Images have about size² pixels.
    size: int = 24
    # Aspect ratios W:H, one bucket each.
    ratios: tuple[str, ...] = ("1:1", "3:4", "4:3")
    # Both sides of every bucket are multiples of this many pixels.
    tile: int = 4
    # Composed scenes in the train split.
    scenes: int = 3000
    # Canonical images (one object on white, captioned by its name) of each concept in each bucket.
    copies: int = 20
    # Caption languages.
    languages: tuple[str, ...] = ("en", "de", "es", "fr", "zh", "it", "ja", "ko", "ru")
    # Of these, the ones kept out of the train captions, to see what the text encoder transfers.
    holdout_languages: tuple[str, ...] = ("it", "ja", "ko", "ru")
    # Scenes in the validation split; none of their captions is in the train split.
    validation: int = 256
    # Seed of the scenes.
    seed: int = 0
    # Replace a data set that is already there.
    overwrite: bool = False


@dataclass(frozen=True)
class FolderConfig:
    """A folder of images with captions in text files beside them, metadata.jsonl or metadata.csv."""

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


def prepare_openmoji(config: OpenMojiConfig, progress: bool = True) -> Path:
    """Write the pictogram data set to config.out and return that path. Same config, same records."""
    _check_openmoji(config)
    concepts = openmoji.load_concepts(config.concepts)
    buckets = make_buckets(config.size, config.ratios, config.tile)
    # Four times the largest use: smooth when scaled down, and the 1024-pixel cap bounds memory (80 of them: 335 MB).
    longest = max(max(bucket.height, bucket.width) for bucket in buckets)
    sprite = scenes.sprite_cache(openmoji.load_sprites(concepts, min(4 * longest, 1024)))
    train_languages = tuple(name for name in config.languages if name not in config.holdout_languages)

    def record(scene: scenes.Scene, languages: Sequence[str]) -> Record:
        return Record(
            image=images.encode_image(scenes.draw(scene, sprite), "png"),
            captions={language: (scenes.caption(scene, language),) for language in languages},
            height=scene.bucket.height,
            width=scene.bucket.width,
            source="openmoji",
            licence=openmoji.LICENCE,
            meta=scenes.scene_meta(scene),
        )

    total = config.concepts * len(buckets) * config.copies + config.scenes + config.validation
    with new_directory(config.out, config.overwrite, NAME) as directory, DataWriter(directory, buckets) as writer:
        for split, scene in show_progress(_openmoji_scenes(config, concepts, buckets), total, "drawing", progress):
            languages = train_languages if split == "train" else config.languages
            writer.write(split, scene.bucket, 0, encode(record(scene, languages)), languages)
        names = [
            {"id": c.id, "code_point": f"U+{openmoji.CODE_POINTS[c.id]:04X}", "names": dict(c.names)} for c in concepts
        ]
        text = json.dumps(names, ensure_ascii=False, indent=1) + "\n"
        (directory / "concepts.json").write_text(text, encoding="utf-8")
        writer.finish(
            source="openmoji",
            config=plain(config),
            licence=openmoji.LICENCE,
            languages=train_languages,
            holdout_languages=config.holdout_languages,
        )
    return report(config.out, progress)


def _openmoji_scenes(
    config: OpenMojiConfig, concepts: Sequence[scenes.Concept], buckets: Sequence[Bucket]
) -> Iterator[tuple[str, scenes.Scene]]:
    for bucket in buckets:
        for concept in concepts:
            for _ in range(config.copies):
                yield "train", scenes.reference_scene(concept, bucket)
    seen = set()
    for split, count in (("train", config.scenes), ("validation", config.validation)):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([config.seed, SPLITS.index(split)])))
        made = rejected = 0
        while made < count:
            scene = scenes.sample_scene(rng, concepts, buckets[made % len(buckets)])
            words = scenes.caption(scene, "en")
            if split == "train":
                seen.add(words)
            elif words in seen:
                rejected += 1
                if rejected == 1000:  # in a row
                    raise LensError(
                        f"validation {config.validation}: {config.concepts} concepts have too few captions that the "
                        f"{config.scenes} train scenes leave unused; take more concepts or fewer scenes"
                    )
                continue
            made, rejected = made + 1, 0
            yield split, scene


def _check_openmoji(config: OpenMojiConfig) -> None:
    for language in (*config.languages, *config.holdout_languages):
        if language not in phrases.LANGUAGES:
            known = ", ".join(phrases.LANGUAGES)
            raise LensError(f"language {language!r}: accepted are {known}{nearest(language, phrases.LANGUAGES)}")
    for language in config.holdout_languages:
        if language not in config.languages:
            raise LensError(f"holdout language {language!r} is not among the languages {', '.join(config.languages)}")
    if len(set(config.languages)) != len(config.languages):
        raise LensError(f"languages {', '.join(config.languages)}: one is given twice")
    if not set(config.languages) - set(config.holdout_languages):
        raise LensError("holdout_languages: at least one language must be left to train with")
    if min(config.scenes, config.copies, config.validation, config.seed) < 0:
        raise LensError("scenes, copies, validation and seed must not be negative")
    if not config.scenes + config.copies:
        raise LensError("scenes and copies are both 0: there would be nothing to train on")
    if config.size < 8:
        raise LensError(f"size {config.size}: pictograms need at least 8 pixels")
    if config.scenes + config.validation and config.concepts < 3:
        raise LensError(f"concepts {config.concepts}: scenes need at least 3")


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
