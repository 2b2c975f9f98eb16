"""What text is written on: one colour, a gradient, or a crop of an image."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from lens_jax.data import images, index
from lens_jax.data.buckets import Bucket
from lens_jax.data.engine.synthetic.colours import draw_colour
from lens_jax.data.engine.synthetic.fonts import Refused
from lens_jax.data.reader import RecordReader
from lens_jax.data.sources.folder import SUFFIXES
from lens_jax.errors import LensError

# Least share of an image that must be left for its caption to be true of the crop.
_WHOLE = 0.7
# Images tried before a gradient takes their place.
_TRIES = 4
_MAX_CAPTION = 2000
_SEEN_BLURRED = 0.004  # of the side


@dataclass(frozen=True)
class Background:
    """Pixels, and what is true of them."""

    image: Any  # of PIL, mode RGB
    # Such as "a gradient from red at the top to white at the bottom"; of an image what it is a part of.
    description: str
    # Of the image it is a crop of; empty where little of that is left.
    caption: str = ""
    # "solid", "gradient", or which image it is of.
    source: str = "solid"
    licence: str = ""
    problems: tuple[Refused, ...] = ()


@dataclass(frozen=True)
class Picture:
    """An encoded image that may be cropped."""

    name: str
    data: bytes
    caption: str
    licence: str


@dataclass(frozen=True)
class Files:
    """Image files, each perhaps with a caption in a .txt beside it."""

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def picture(self, number: int) -> Picture:
        """LensError where it cannot be read."""
        path = Path(self.paths[number])
        try:
            if path.stat().st_size > images.MAX_ENCODED_BYTES:
                raise LensError(f"{path.name}: over {images.MAX_ENCODED_BYTES} bytes")
            data = path.read_bytes()
        except OSError as error:
            raise LensError(f"{path.name}: {error.strerror}") from None
        name = os.fsencode(path.name).decode("utf-8", "replace")
        return Picture(name, data, _caption_beside(path), "")

    def fingerprint(self) -> str:
        """Changes with names and sizes; not read, since there may be millions."""
        said = "\0".join(f"{path}\0{os.path.getsize(path)}" for path in self.paths)
        return hashlib.sha256(said.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True)
class Packed:
    """The training images of a data set: what the engine kept of a source."""

    index: index.Index
    reader: RecordReader = field(repr=False)
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return self.ends[-1]

    def picture(self, number: int) -> Picture:
        """LensError where it cannot be read."""
        which = bisect_right(self.ends, number)
        stream = self.index.select("train")[which]
        at = number - (self.ends[which - 1] if which else 0)
        record = self.reader.read(stream, np.array([at]))[0]
        name = str(record.meta.get("id") or record.source or f"{stream.name}/{at:08d}")[:500]
        caption = next(iter(record.captions.get("en", ())), "")
        return Picture(name, record.image, caption, record.licence or self.index.licence)

    def fingerprint(self) -> str:
        return self.index.fingerprint


@dataclass(frozen=True)
class Backgrounds:
    """Images that crops are taken of; without any, colours and gradients alone."""

    sources: tuple[Files | Packed, ...] = ()

    def draw(self, rng: np.random.Generator, shape: Bucket, blur: bool) -> Background:
        """One colour (one in four), a gradient (one in four), or where there are images a crop of one."""
        kind = rng.choice(3, p=[0.2, 0.2, 0.6] if self.sources else [0.5, 0.5, 0])
        if kind == 0:
            return _solid(rng, shape)
        if kind == 1:
            return _gradient(rng, shape)
        problems = []
        for _ in range(_TRIES):
            source = self.sources[rng.integers(len(self.sources))]
            number = int(rng.integers(len(source)))
            try:
                picture = source.picture(number)
                whole = images.open_image(picture.data, picture.name)
            except LensError as error:
                problems.append(Refused("background", "unreadable image", str(error)[:300]))
                continue
            return _crop(rng, shape, picture, whole, blur, tuple(problems))
        made = _gradient(rng, shape)
        return Background(made.image, made.description, source=made.source, problems=tuple(problems))

    def captions(self, most: int) -> Iterator[str]:
        """Captions of the first images of each source, at most `most` in all."""
        for source in self.sources:
            for number in range(min(len(source), most // len(self.sources))):
                try:
                    caption = source.picture(number).caption
                except LensError:
                    continue  # named when it is drawn
                if caption:
                    yield caption


def open_backgrounds(paths: Sequence[str]) -> Backgrounds:
    """Images, folders of them, and data sets; LensError where a path is none of these or has no image."""
    sources: list[Files | Packed] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_file():
            sources.append(Files((str(path),)))
        elif (path / index.NAME).is_file():
            sources.append(_open_packed(path))
        elif path.is_dir():
            found = [
                os.path.join(folder, name)
                for folder, _, names in os.walk(path)
                for name in names
                if name.lower().endswith(SUFFIXES)
            ]
            if not found:
                raise LensError(f"synthetic.backgrounds: {given}: no image in it; accepted are {', '.join(SUFFIXES)}")
            sources.append(Files(tuple(sorted(found))))
        else:
            raise LensError(f"synthetic.backgrounds: {given}: no such file or folder")
    return Backgrounds(tuple(sources))


def _open_packed(path: Path) -> Packed:
    loaded = index.load_index(path)
    if loaded.features is not None:
        raise LensError(f"synthetic.backgrounds: {path} holds features; name the data set of images")
    ends = tuple(accumulate(stream.records for stream in loaded.select("train")))
    if not ends:
        raise LensError(f"synthetic.backgrounds: {path} has no image to train on")
    return Packed(loaded, RecordReader(loaded, open_files=32), ends)


def _caption_beside(path: Path) -> str:
    try:
        with open(path.with_suffix(".txt"), encoding="utf-8-sig") as file:
            line = " ".join(file.readline(20 * _MAX_CAPTION).split())
    except (OSError, UnicodeDecodeError):
        return ""
    return line if line.isprintable() else ""


def _solid(rng: np.random.Generator, shape: Bucket) -> Background:
    from PIL import Image

    name, colour = draw_colour(rng)
    return Background(Image.new("RGB", (shape.width, shape.height), colour), f"plain {name}")


# Where a gradient begins and ends, and its direction (x, y).
_DIRECTIONS = (
    ("at the top", "at the bottom", (0, 1)),
    ("on the left", "on the right", (1, 0)),
    ("at the top left", "at the bottom right", (1, 1)),
    ("at the bottom left", "at the top right", (1, -1)),
)


def _gradient(rng: np.random.Generator, shape: Bucket) -> Background:
    from PIL import Image

    (first, a), (second, b) = draw_colour(rng), draw_colour(rng)
    while second == first:
        second, b = draw_colour(rng)
    start, end, (right, down) = _DIRECTIONS[rng.integers(len(_DIRECTIONS))]
    x = np.linspace(0, 1, shape.width, dtype=np.float32) * right
    y = (np.linspace(0, 1, shape.height, dtype=np.float32) if down > 0 else np.linspace(1, 0, shape.height)) * abs(down)
    share = (np.add.outer(y, x) / (abs(right) + abs(down))).astype(np.float32)[..., None]
    # Half a level of noise instead of bands.
    few = rng.random((32, shape.width, 1), dtype=np.float32)
    noise = np.resize(few, (shape.height, shape.width, 1))
    pixels = np.array(a, np.float32) * (1 - share) + np.array(b, np.float32) * share + noise
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return Background(image, f"a gradient from {first} {start} to {second} {end}", source="gradient")


def _crop(rng, shape: Bucket, picture: Picture, whole, blur: bool, problems: tuple[Refused, ...]) -> Background:
    from PIL import Image, ImageFilter

    width, height = whole.size
    # The largest window of that shape, then less of it, but not less than would have to be enlarged.
    scale = min(width / shape.width, height / shape.height)
    share = rng.uniform(0.5, 1) if rng.random() < 0.5 else 1.0
    scale = min(scale, max(scale * share, 1.0))
    w, h = shape.width * scale, shape.height * scale
    # Rounding must not lead outside.
    left, top = rng.random() * max(width - w, 0), rng.random() * max(height - h, 0)
    box = (left, top, min(left + w, width), min(top + h, height))
    image = whole.resize((shape.width, shape.height), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    kept = w * h / (width * height) >= _WHOLE
    description = "an image" if kept else "a detail of an image"
    side = (shape.width * shape.height) ** 0.5
    if blur and rng.random() < 0.3:
        radius = side * rng.uniform(0.001, 0.012)
        image = image.filter(ImageFilter.GaussianBlur(radius))
        if radius > _SEEN_BLURRED * side:
            description = description.replace("an image", "a blurred image")
    caption = picture.caption if kept and len(picture.caption) <= _MAX_CAPTION else ""
    return Background(image, description, caption, picture.name, picture.licence, problems)
