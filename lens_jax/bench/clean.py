"""`lens-jax bench clean`: decoding an image and its three classical scores, beside the same with Pillow and numpy.

Processor time is compared, of all threads, image by image in turn: what else the machine does slows both alike.
"""

import dataclasses
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lens_jax.bench import measure
from lens_jax.bench.data import photograph
from lens_jax.data.engine import measure as scores
from lens_jax.data.engine.decode import decode
from lens_jax.data.engine.extra import needed
from lens_jax.errors import LensError


@dataclasses.dataclass(frozen=True)
class CleanBench:
    """Milliseconds of processor time an image: decode, clarity, entropy, luminance."""

    # A folder of JPEGs; by default some are made, with the edges, spectrum and noise of photographs.
    images: str = ""
    # Images, and the side in pixels of those that are made.
    count: int = 8
    side: int = 1024
    # Passes over all images, in turn with the other version; the sum is reported.
    repeats: int = 5
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "count", "side", "repeats")


def bench_clean(bench: CleanBench) -> dict:
    """Time both versions on the same images; returns milliseconds an image, their ratio, and how far scores differ."""
    needed("cv2").setNumThreads(1)
    files = _files(bench)
    runs: dict[str, Callable[[bytes], object]] = {
        "engine": lambda data: scores.measure(decode(data)),
        "pillow_numpy": _by_pillow_and_numpy,
        "engine_decode": decode,
        "pillow_decode": _decode_by_pillow,
    }
    seconds = dict.fromkeys(runs, 0.0)
    for repeat in range(1 + bench.repeats):  # the first for warming up
        for data in files:
            for name, run in runs.items():
                started = time.process_time()
                run(data)
                seconds[name] += (time.process_time() - started) * bool(repeat)
    ours = [scores.measure(decode(data)) for data in files]
    theirs = [_by_pillow_and_numpy(data) for data in files]
    result = {"images": len(files), "megabytes_a_image": sum(map(len, files)) / len(files) / 1e6}
    result["megapixels_a_image"] = float(np.mean([decode(data).size / 3e6 for data in files]))
    result |= {f"{name}_milliseconds": 1e3 * value / (bench.repeats * len(files)) for name, value in seconds.items()}
    result["ratio_to_pillow_numpy"] = seconds["pillow_numpy"] / seconds["engine"]
    # What is computed is the same but for the resize, which no filter of Pillow's has.
    result["luminance_differs_by"] = max(abs(a.luminance - b[2]) for a, b in zip(ours, theirs))
    result["entropy_differs_by"] = max(abs(a.entropy - b[1]) for a, b in zip(ours, theirs))
    result["clarity_differs_by_a_share_of"] = max(abs(b[0] / a.laplacian - 1) for a, b in zip(ours, theirs))
    return measure.report(bench, result)


def _files(bench: CleanBench) -> list[bytes]:
    if bench.images:
        paths = sorted(p for p in Path(bench.images).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[: bench.count]
        if not paths:
            raise LensError(f"{bench.images}: no .jpg or .jpeg in it")
        return [path.read_bytes() for path in paths]
    rng, files = np.random.default_rng(0), []
    for _ in range(bench.count):
        buffer = io.BytesIO()
        photograph(rng, bench.side, bench.side).save(buffer, "JPEG", quality=90, subsampling=2)
        files.append(buffer.getvalue())
    return files


def _decode_by_pillow(data: bytes):
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def _by_pillow_and_numpy(data: bytes) -> tuple[float, float, float]:
    """(clarity, entropy, luminance) by the fastest calls of Pillow and numpy that we found."""
    from PIL import Image, ImageChops

    image = _decode_by_pillow(data)
    scale = scores.SIDE / (image.width * image.height) ** 0.5
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BOX))
    padded = np.pad(grey.astype(np.int16), 1, mode="reflect")
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    shares = np.bincount(grey.ravel(), minlength=256) / grey.size
    shares = shares[shares > 0]
    red, green, blue = image.split()
    counts = ImageChops.lighter(ImageChops.lighter(red, green), blue).histogram()  # numpy's max takes ten times as long
    return (
        float((around - 4 * padded[1:-1, 1:-1]).var(dtype=np.float32)),
        float(-(shares * np.log2(shares)).sum()),
        float(np.dot(counts, np.arange(256)) / sum(counts) / 255),
    )
