"""`lens-jax bench data`: images a second of the input pipeline, beside PyTorch's DataLoader on the same files."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from lens_jax.bench import measure, order
from lens_jax.data import images
from lens_jax.data.buckets import Bucket, fit_image
from lens_jax.data.config import DataConfig
from lens_jax.data.datasets import DataSets, open_data
from lens_jax.data.pipeline import batches
from lens_jax.data.prepare import FolderConfig, in_threads, prepare_folder
from lens_jax.data.reader import RecordReader

# Width to height of the made images, in turn: what cameras and cropping give.
_SHAPES = ((3, 2), (4, 3), (1, 1), (2, 3), (16, 9), (3, 4))


@dataclasses.dataclass(frozen=True)
class DataBench:
    """Batches from large image files (decode, resize, crop), and from the records that `prepare` makes of them."""

    # A folder of captioned images; by default some are made, with the edges, spectrum and noise of photographs.
    images: str = ""
    # Images to make, and their longer side in pixels.
    count: int = 48
    side: int = 2400
    # Format of the made images and of the records.
    encoding: Literal["jpeg", "png"] = "jpeg"
    # Sizes to fit them to, as `prepare folder --buckets` takes them.
    buckets: tuple[str, ...] = ("lens-512",)
    # Images a batch.
    batch_size: int = 8
    # Threads of ours, and worker processes of PyTorch's.
    threads: int = 2
    # Timed passes over all images; the median is reported.
    repeats: int = 5
    # Time PyTorch's DataLoader with PIL on the same files in turn (needs the extra: parity).
    against: Literal["none", "torch"] = "none"
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "count", "side", "batch_size", "threads", "repeats")


def bench_data(bench: DataBench) -> dict:
    """Make images and a data set of them in a temporary folder, time passes over both, return the figures."""
    with tempfile.TemporaryDirectory() as folder:
        if not bench.images:
            _make_images(bench, Path(folder) / "images")
        images = Path(bench.images or Path(folder) / "images")
        prepared = str(Path(folder) / "prepared")
        prepare_folder(
            FolderConfig(
                path=str(images), out=prepared, buckets=bench.buckets, encoding=bench.encoding, validation=0.0,
                threads=bench.threads,
            ),
            progress=False,
        )  # fmt: skip
        data = open_data(DataConfig(path=prepared, batch_size=bench.batch_size, threads=bench.threads))
        files, records = _epoch(data, images, Path(folder) / "records")
        runs: dict[str, Callable] = {
            "files": lambda: _exhaust(_from_files(files, bench.threads)),
            "records": lambda: _exhaust(batches(data, count=len(records))),
        }
        if bench.against == "torch":
            from lens_jax.bench import against

            runs["torch_files"] = against.loader(files, bench.threads)
            runs["torch_records"] = against.loader(records, bench.threads)
        seconds = measure.medians(runs, bench.repeats)
        number = sum(map(len, files))
        sizes = [path.stat().st_size for batch in files for path, *_ in batch]
        result = {
            "images": number,
            "megabytes_a_image": sum(sizes) / number / 1e6,
            "buckets": " ".join(bench.buckets),
            "threads": bench.threads,
        }
    if bench.against == "torch":
        result["against"] = against.versions("torch", "pillow")
    cores = min(bench.threads, os.cpu_count() or 1)
    result |= {f"{name}_images_per_second_and_core": number / value / cores for name, value in seconds.items()}
    if bench.against == "torch":
        for name in ("files", "records"):
            result[f"{name}_ratio_to_torch"] = seconds[f"torch_{name}"] / seconds[name]
    result |= order.figures()
    return measure.report(bench, result)


def _epoch(data: DataSets, images: Path, folder: Path) -> tuple[list, list]:
    """Full batches of all images, twice: as original files and as files of the records' images, (path, H, W) each."""
    folder.mkdir()
    reader, size = RecordReader(data.indexes[0]), data.config.batch_size
    originals, fitted = [], []
    for feed, origin in zip(*data.feeds("train")):
        bucket = dataclasses.astuple(feed.shape.bucket)
        for start in range(0, feed.records, size):
            positions = np.arange(start, start + size) % feed.records
            found = reader.read(origin.stream, positions)
            originals.append([(images / record.source, *bucket) for record in found])
            paths = [folder / f"{origin.stream.name}-{position}" for position in positions]
            for path, record in zip(paths, found):
                path.write_bytes(record.image)
            fitted.append([(path, *bucket) for path in paths])
    reader.close()
    return originals, fitted


def _from_files(epoch: list, threads: int) -> Iterator[np.ndarray]:
    """Batches uint8 [B, H, W, 3] of original files, each image read, decoded and fitted as `prepare` does."""

    def fit(item) -> np.ndarray:
        path, height, width = item
        return fit_image(images.open_image(path.read_bytes(), path.name), Bucket(height, width))

    fitted = in_threads(fit, (item for batch in epoch for item in batch), threads)
    for batch in epoch:
        yield np.stack([next(fitted) for _ in batch])


def _exhaust(reader) -> None:
    for _ in reader:
        pass
    if hasattr(reader, "close"):
        reader.close()


def _make_images(bench: DataBench, folder: Path) -> None:
    """`count` files, captioned so that `prepare` takes them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(bench.count):
        width, height = _SHAPES[number % len(_SHAPES)]
        scale = bench.side / max(width, height)
        image = photograph(rng, round(height * scale), round(width * scale))
        path = folder / f"{number:05d}.{bench.encoding}"
        # Cameras and web sites keep colour at half the resolution.
        image.save(path, **({"quality": 90, "subsampling": 2} if bench.encoding == "jpeg" else {}))
        path.with_suffix(".txt").write_text(f"image {number}")


def photograph(rng: np.random.Generator, height: int, width: int):
    """Dead leaves: discs of all sizes (radii with density r⁻³) over one another have the edges and the 1/f² power
    spectrum of photographs. Slightly blurred, lit from a corner, with the noise of a sensor."""
    from PIL import Image, ImageDraw, ImageFilter

    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    count, smallest, largest = 6000, 3, 0.3 * width
    radii = smallest / np.sqrt(rng.uniform((smallest / largest) ** 2, 1, count))
    centres = rng.uniform(0, (width, height), (count, 2))
    colours = np.clip(rng.normal(128, 55, (count, 1)) + rng.normal(0, 25, (count, 3)), 0, 255).astype(int)
    for (x, y), r, colour in zip(centres, radii, colours):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(map(int, colour)))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.8)), np.float32)
    pixels = pixels * np.linspace(1.2, 0.7, width, dtype=np.float32)[:, None]
    pixels *= np.linspace(1.1, 0.8, height, dtype=np.float32)[:, None, None]
    pixels += 3 * rng.standard_normal(pixels.shape, np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
