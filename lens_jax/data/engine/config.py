"""A data engine's run as a config: sources, thresholds, models, captions, and how the result is packed."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal

from lens_jax.config import check_numbers, values
from lens_jax.data.caption_length import check_classes
from lens_jax.data.engine.captions.config import Caption
from lens_jax.errors import LensError

# What may be a folder of the output and part of a file name on every system.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What an image must reach to be kept (report, section 2). None leaves a step out; scores are stored all the same.

    The report states those of area, aesthetic and cosine; the others are ours.
    """

    # Least width times height, in pixels.
    area: int = 384**2
    # Drop from this probability of unsafe content on.
    nsfw: float | None = 0.5
    # Drop below this aesthetic score, of 1 to 10.
    aesthetic: float | None = 3.0
    # Drop from this probability of a watermark on.
    watermark: float | None = 0.5
    # Drop below this variance of the Laplacian, in squared grey levels of an image of area 384².
    laplacian: float | None = 10.0
    # Drop below this entropy of the grey histogram, in bits.
    entropy: float | None = 1.0
    # Drop outside of this range of the mean of HSV's V, of 0 to 1.
    luminance: tuple[float, float] | None = (0.05, 0.98)
    # Above this cosine two images are duplicates, and the first in the order of priority is kept.
    cosine: float | None = 0.985

    def __post_init__(self):
        check_numbers(self, "thresholds")
        if self.area < 1:
            raise LensError(f"thresholds.area is {self.area}; it must be at least 1 pixel")
        for name, low, high in (
            ("nsfw", 0, 1),
            ("aesthetic", 1, 10),
            ("watermark", 0, 1),
            ("laplacian", 0, math.inf),
            ("entropy", 0, 8),
            ("cosine", 0.5, 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise LensError(f"thresholds.{name} is {value}; it must lie within {low} to {high}, or be None")
        if self.luminance is not None and not 0 <= self.luminance[0] < self.luminance[1] <= 1:
            raise LensError(f"thresholds.luminance is {self.luminance}; it must be two rising numbers within 0 to 1")


@dataclasses.dataclass(frozen=True)
class Source:
    """A collection of images that becomes one data set."""

    # Names the data set; letters, digits, dots, dashes and underscores.
    name: str
    # How it lies on disk; `data/engine/readers/` says what each kind is.
    kind: Literal["folder", "webdataset", "parquet", "table", "imagefolder", "tfds", "lens"]
    # A folder, a file, or a pattern of files. Nothing is downloaded.
    path: str
    # How often an image of it is seen in training, relative to one of the other sources.
    weight: float = 1.0
    # Of images that bring no licence of their own.
    licence: str = "unspecified"
    # Captions: those that come with the images, new ones by a model, or new brief ones.
    caption: Literal["keep", "generate", "brief"] = "generate"
    # Names of the source's columns where they are not the usual ones, such as {"image": "jpg", "key": "id"}.
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # In place of the thresholds of the whole run; of `cosine` only None counts.
    thresholds: Thresholds | None = None

    def __post_init__(self):
        if not _NAME.fullmatch(self.name) or self.name in ("mixture.json", "report.html", "removed.txt"):
            raise LensError(f"source name {self.name!r:.80}: use 1 to 64 letters, digits, dots, dashes and underscores")
        if not self.path:
            raise LensError(f"source {self.name}: it has no path")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise LensError(f"source {self.name}: weight is {self.weight}; it must be at least 0")
        if not all(isinstance(word, str) for pair in self.columns.items() for word in pair):
            raise LensError(f"source {self.name}: columns {self.columns!r:.80}: names of columns by what they hold")


@dataclasses.dataclass(frozen=True)
class Models:
    """The networks that score and embed. An empty path leaves a step out, which the report page says."""

    # "open_nsfw", which a package carries, or the folder of an EVA-02 classifier of four levels: a download of
    # Freepik/nsfw_image_detector (config.json, model.safetensors).
    nsfw: str = "open_nsfw"
    # The folder of google/siglip-so400m-patch14-384 with the head of Aesthetic Predictor v2.5 in it, as safetensors.
    aesthetic: str = ""
    # The folder of prithivMLmods/Watermark-Detection-SigLIP2.
    watermark: str = ""
    # The folder of openai/clip-vit-large-patch14, or "layout", a descriptor that needs no files but another threshold
    # of cosine.
    embedding: str = ""
    # Images a forward pass.
    batch: int = 256
    # Of the networks in JAX.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self):
        if self.batch < 1:
            raise LensError(f"models.batch is {self.batch}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Dedup:
    """How near duplicates are found (report, section 2, step 9). None of it but the priority changes what is kept at
    a margin of 1."""

    # Cells that the vectors are sorted into; 0 takes the root of their number.
    centroids: int = 0
    # How far beyond its cell's border a vector is compared, in units of what makes the search exact; None is 1 up to
    # ten million vectors, and 0.2 above.
    margin: float | None = None
    # A cell of more vectors is divided once more.
    max_cell: int = 20_000
    # Of two duplicates that one is kept which is higher in these, in turn.
    priority: tuple[str, ...] = ("aesthetic", "area", "id")
    # Of the choice of centroids.
    seed: int = 0

    def __post_init__(self):
        check_numbers(self, "dedup")
        for name, least in (("centroids", 0), ("max_cell", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise LensError(f"dedup.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.margin is not None and not 0 <= self.margin <= 1:
            raise LensError(f"dedup.margin is {self.margin}; it must lie within 0 to 1")
        known = ("aesthetic", "area", "id")
        if not self.priority or self.priority[-1] != "id" or set(self.priority) - set(known):
            raise LensError(f"dedup.priority is {self.priority}; accepted: some of {', '.join(known)}, id last")


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Images of rendered text, a source of the report of its own (report, section 1)."""

    # How many are made; 0 makes none.
    count: int = 0
    # Font files, folders of them, or patterns of either.
    fonts: tuple[str, ...] = ()
    # Files of strings in UTF-8, one a line. Without any, English words, numbers, prices and dates are written.
    texts: tuple[str, ...] = ()
    # What text is written on besides plain colours and gradients: images, folders of them, or data sets that
    # `lens-jax data` or `lens-jax prepare` wrote, whose captions become a part of ours.
    backgrounds: tuple[str, ...] = ()
    # Languages of numbers, prices, dates and days: en, de, fr, ar, hi, zh, ...; `synthetic/locales.py` has them all.
    locales: tuple[str, ...] = ("en",)
    # "augmented" as the report says; "plain" upright, sharp and in strong contrast, which text readers can read.
    style: Literal["augmented", "plain"] = "augmented"
    # The root of an image's area in pixels. Its shape is drawn from the buckets of that area, else it is a square.
    size: int = 1024
    # Of all that is drawn by chance.
    seed: int = 0

    def __post_init__(self):
        for name, least, most in (("count", 0, 10**12), ("size", 64, 4096), ("seed", 0, 2**63 - 1)):
            if not least <= getattr(self, name) <= most:
                raise LensError(f"synthetic.{name} is {getattr(self, name)}; it must lie within {least} to {most}")
        if self.style not in ("augmented", "plain"):
            raise LensError(f"synthetic.style is {self.style!r:.40}; accepted: augmented, plain")
        if not self.locales:
            raise LensError("synthetic.locales is empty; name at least one language, such as en")
        if self.count and not self.fonts:
            raise LensError("synthetic.fonts is empty; name font files or folders of them, such as /usr/share/fonts")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """From raw collections to data sets that training reads."""

    # The collections.
    sources: tuple[Source, ...]
    # Folder of what is computed on the way: one table a unit of work and stage, found again by a later run.
    work: str = "work/data"
    # Folder of the data sets, one a source.
    out: str = "data/engine"
    # What an image must reach, where its source does not say otherwise.
    thresholds: Thresholds = Thresholds()
    # What scores and embeds.
    models: Models = Models()
    # How near duplicates are found.
    dedup: Dedup = Dedup()
    # None writes no captions: sources keep those that they bring.
    caption: Caption | None = None
    # Images of rendered text as one more source.
    synthetic: Synthetic = Synthetic()
    # Sizes that images are cropped to, as `lens-jax prepare --buckets` takes them.
    buckets: tuple[str, ...] = ("lens-pretraining",)
    # Most that an image may be enlarged to fill its bucket.
    max_upscale: float = 1.0
    # Records whose captions are about as long lie together, as `lens-jax prepare --caption-classes` has it; lengths are
    # estimated, half too long in English. () is for sets that are small beside a batch.
    caption_classes: tuple[int, ...] = ()
    # How images are stored.
    encoding: Literal["jpeg", "png", "webp"] = "jpeg"
    # Share of images that is held out for validation.
    validation: float = 0.001
    # Refuse JPEGs in which the decoder finds anything wrong, not only those that it cannot decode.
    strict_jpeg: bool = True
    # Refuse images of more pixels, or files of more bytes, unread.
    max_pixels: int = 80_000_000
    max_bytes: int = 64 << 20
    # Images a unit of work, where a source does not say by its files.
    unit_rows: int = 2000
    # Units are written together until their images are of about so many bytes.
    group_bytes: int = 8 << 30
    # The order in which the steps are counted: as the report has them, or the cheap ones first. What is kept is the
    # same.
    order: Literal["report", "cheap"] = "report"
    # Runs of a unit that may end without a result before its images are tried one by one.
    attempts: int = 2
    # Limits of one image that is tried alone: seconds, and bytes of memory beyond what the models take.
    item_seconds: float = 60.0
    item_memory: int = 4 << 30
    # A worker is ended, and its unit tried again, after so many seconds without a sign of life.
    stall_seconds: float = 300.0
    # Seed of what is drawn by chance, such as the samples on the report page.
    seed: int = 0

    def __post_init__(self):
        check_numbers(self)
        if not self.sources and not self.synthetic.count:
            raise LensError("sources is empty; name at least one lens_jax.data.engine.config.Source")
        names = [source.name.lower() for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise LensError(f"sources: two are named {name!r}; each becomes a folder of its own")
        for name, least in (
            ("max_pixels", 1),
            ("max_bytes", 1),
            ("unit_rows", 1),
            ("group_bytes", 1),
            ("attempts", 1),
            ("item_memory", 1 << 26),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise LensError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("item_seconds", "stall_seconds"):
            if getattr(self, name) <= 0:
                raise LensError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.max_upscale < 1:
            raise LensError(f"max_upscale is {self.max_upscale}; it must be at least 1, which enlarges nothing")
        check_classes(self.caption_classes)
        if not 0 <= self.validation < 1:
            raise LensError(f"validation is {self.validation}; it must be at least 0 and below 1")
        for name in ("work", "out"):
            if not getattr(self, name):
                raise LensError(f"{name} is empty; it must be a folder")

    def thresholds_of(self, source: Source) -> Thresholds:
        """The thresholds that hold for a source. Of its own, that of `cosine` only leaves step 9 out: duplicates are
        looked for among all sources together, so there is one for all."""
        thresholds = source.thresholds or self.thresholds
        cosine = None if thresholds.cosine is None else self.thresholds.cosine
        return dataclasses.replace(thresholds, cosine=cosine)

    def source(self, name: str) -> Source:
        """The source of that name; KeyError where there is none."""
        return {source.name: source for source in self.sources}[name]


def plain(config: EngineConfig) -> dict[str, object]:
    """Every value of a config by its dotted name, for a fingerprint or to be shown."""
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values(config)}
