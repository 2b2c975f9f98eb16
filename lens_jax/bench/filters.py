"""`lens-jax bench filters`: precision and recall of the cleaning's classical filters on constructed images.

Each case is a way to make an image of a photograph, and says whether it should be dropped. Recall is the share of
those that should be dropped that are, precision the share of what is dropped that should be. Thresholds are the
defaults.
"""

import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.progress import track
from rich.table import Table

from lens_jax.bench import measure
from lens_jax.bench.data import photograph
from lens_jax.console import make_console
from lens_jax.data.engine import measure as scores
from lens_jax.data.engine.config import Thresholds
from lens_jax.data.engine.decode import Undecodable, decode
from lens_jax.data.engine.extra import needed
from lens_jax.data.images import decode_image
from lens_jax.errors import LensError

# Below this a damaged image is seen to be: a tenth of one with 8 x 8 blocks lost has about so many decibels.
VISIBLE = 35.0
# Longer sides are shrunk to this.
LONGEST = 1024


@dataclasses.dataclass(frozen=True)
class FiltersBench:
    """What the filters of files, clarity, entropy and luminance drop of images of which it is known what they are."""

    # A folder of photographs of at least 384² pixels, all in order; by default some are made.
    images: str = ""
    # Photographs.
    count: int = 16
    # Damaged files of each kind, a photograph.
    damages: int = 10
    # Of what is drawn by chance.
    seed: int = 0
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "count", "damages")


@dataclasses.dataclass
class Case:
    """Images made in one way."""

    filter: str
    name: str
    # What should become of them; None is not judged, only shown.
    drop: bool | None
    images: int = 0
    dropped: int = 0
    # Also by what one uses without the engine: Pillow.
    by_pillow: int = 0


def bench_filters(bench: FiltersBench) -> dict:
    """Make the images, filter them, print a table of all cases; returns precision and recall of each filter."""
    photographs = _photographs(bench)
    cases = [*_files(photographs, bench), *_pixels(photographs, bench)]
    table = Table(title=f"{len(photographs)} photographs")
    for title in ("filter", "images", "should be dropped", "of", "are dropped", "by Pillow"):
        table.add_column(title)
    result: dict[str, object] = {"photographs": len(photographs)}
    for case in cases:
        wanted = {True: "yes", False: "no", None: "not judged"}[case.drop]
        pillow = str(case.by_pillow) if case.filter == "corrupt" else ""
        table.add_row(case.filter, case.name, wanted, str(case.images), str(case.dropped), pillow)
        result[f"{case.filter}, {case.name}"] = f"{case.dropped} of {case.images}"
    make_console().print(table)
    for name in dict.fromkeys(case.filter for case in cases):
        judged = [case for case in cases if case.filter == name and case.drop is not None]
        bad = sum(case.images for case in judged if case.drop)
        caught = sum(case.dropped for case in judged if case.drop)
        dropped = sum(case.dropped for case in judged)
        result[f"{name} precision"] = caught / max(dropped, 1)
        result[f"{name} recall"] = caught / max(bad, 1)
    judged = [case for case in cases if case.filter == "corrupt" and case.drop]
    result["corrupt recall of Pillow"] = sum(c.by_pillow for c in judged) / max(sum(c.images for c in judged), 1)
    return measure.report(bench, result)


def _photographs(bench: FiltersBench) -> list[np.ndarray]:
    """uint8 [H, W, 3] each."""
    from PIL import Image

    if not bench.images:
        rng = np.random.default_rng(bench.seed)
        return [np.asarray(photograph(rng, 768, LONGEST)) for _ in range(bench.count)]
    found = []
    for path in sorted(p for p in Path(bench.images).rglob("*") if p.is_file()):
        if len(found) < bench.count and path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"):
            image = Image.fromarray(decode_image(path.read_bytes(), str(path)))
            if image.width * image.height >= Thresholds().area:
                image.thumbnail((LONGEST, LONGEST))
                found.append(np.asarray(image))
    if not found:
        raise LensError(f"{bench.images}: no PNG, JPEG or WebP of at least 384² pixels in it")
    return found


# (name, format, options of Pillow, whether a flipped bit is always found)
_ENCODINGS = (
    ("JPEG", "JPEG", {"quality": 85}),
    ("progressive JPEG", "JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
    ("PNG", "PNG", {"compress_level": 1}),
    ("WebP", "WEBP", {"quality": 80, "method": 0}),
)


def _files(photographs: list[np.ndarray], bench: FiltersBench) -> list[Case]:
    """Whole files, files that end early, and files with three flipped bits."""
    from PIL import Image

    rng, cases = np.random.default_rng(bench.seed), {}

    def add(name: str, drop: bool | None, data: bytes) -> None:
        case = cases.setdefault(name, Case("corrupt", name, drop))
        case.images += 1
        case.dropped += _fails(decode, data)
        case.by_pillow += _fails(_open_by_pillow, data)

    work = [(*encoding, pixels) for encoding in _ENCODINGS for pixels in photographs]
    for name, kind, options, pixels in track(work, "damaging files", console=make_console(stderr=True), transient=True):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, **options)
        whole = buffer.getvalue()
        clean = _open_by_pillow(whole).astype(np.float32)
        add(f"{name}, whole", False, whole)
        for _ in range(bench.damages):
            add(f"{name}, ends early", True, whole[: rng.integers(len(whole) // 20, len(whole))])
            damaged = bytearray(whole)
            for at in rng.integers(len(whole) // 20, len(whole), 3):
                damaged[at] ^= 1 << int(rng.integers(8))
            seen = _decibels(bytes(damaged), clean) < VISIBLE
            add(f"{name}, 3 bits flipped, {'seen' if seen else 'not seen'}", True if seen else None, bytes(damaged))
    return list(cases.values())


def _fails(function: Callable, data: bytes) -> bool:
    try:
        function(data)
    except (Undecodable, OSError, SyntaxError, ValueError):
        return True
    return False


def _open_by_pillow(data: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _decibels(data: bytes, clean: np.ndarray) -> float:
    """Peak signal to noise of what Pillow shows; 0 where it shows nothing."""
    try:
        error = np.square(_open_by_pillow(data) - clean).mean()
    except (OSError, SyntaxError, ValueError):
        return 0.0
    return 10 * np.log10(255**2 / max(float(error), 1e-9))


def _pixels(photographs: list[np.ndarray], bench: FiltersBench) -> list[Case]:
    """Blurred, flat, dark and bright images by the scores of all three filters."""
    limits, cases, rng = Thresholds(), [], np.random.default_rng(bench.seed)
    low, high = limits.luminance
    filters: dict[str, tuple[Callable, Callable]] = {
        "clarity": (_for_clarity, lambda found: found.laplacian < limits.laplacian),
        "entropy": (_for_entropy, lambda found: found.entropy < limits.entropy),
        "luminance": (_for_luminance, lambda found: not low <= found.luminance <= high),
    }
    for name, (make, fails) in filters.items():
        counts: Counter[tuple[str, bool | None]] = Counter()
        gone: Counter[tuple[str, bool | None]] = Counter()
        for pixels in track(photographs, name, console=make_console(stderr=True), transient=True):
            for kind, drop, image in make(pixels, rng):
                counts[kind, drop] += 1
                gone[kind, drop] += fails(scores.measure(image))
        cases += [Case(name, kind, drop, count, gone[kind, drop]) for (kind, drop), count in counts.items()]
    return cases


Made = Iterator[tuple[str, bool | None, np.ndarray]]


def _for_clarity(pixels: np.ndarray, rng: np.random.Generator) -> Made:
    """Widths of blur are in pixels of the image at area 384²."""
    cv2 = needed("cv2")
    height, width = pixels.shape[:2]
    scale = (height * width) ** 0.5 / scores.SIDE
    yield "as they are", False, pixels
    for sigma, drop in ((0.5, False), (1, None), (2, True), (3, True), (4, True)):
        yield f"Gaussian blur, sigma {sigma}", drop, cv2.GaussianBlur(pixels, (0, 0), sigma * scale)
    for factor in (8, 12):
        small = cv2.resize(pixels, (width // factor, height // factor), interpolation=cv2.INTER_AREA)
        yield f"enlarged {factor} times", True, cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    length = round(12 * scale) | 1
    path = np.zeros((length, length), np.float32)
    path[length // 2] = 1 / length
    yield "moved by 12 pixels", None, cv2.filter2D(pixels, -1, path)
    yield "poster", False, _poster(width, height)


def _for_entropy(pixels: np.ndarray, rng: np.random.Generator) -> Made:
    height, width = pixels.shape[:2]
    yield "as they are", False, pixels
    yield "posters, black on white", False, _poster(width, height)
    yield "logos of four colours", False, _logo(width, height, rng)
    yield "night, 4 stops darker", False, _exposed(pixels, -4)
    yield "one colour", True, np.broadcast_to(rng.integers(0, 256, 3, np.uint8), pixels.shape).copy()
    page = np.full(pixels.shape, 255, np.uint8)
    page[: height // 20, : width // 4] = 0
    yield "blank page with a mark", True, page
    empty = np.full(pixels.shape, 240, np.uint8)
    empty[height // 2 - 20 : height // 2 + 20, width // 2 - 20 : width // 2 + 20] = pixels[:40, :40]
    yield "placeholder with an icon", True, empty


def _for_luminance(pixels: np.ndarray, rng: np.random.Generator) -> Made:
    height, width = pixels.shape[:2]
    yield "as they are", False, pixels
    for stops, drop in ((-2, False), (-4, None), (-5, None), (-6, True), (-7, True), (2, False), (4, None)):
        yield f"exposed by {stops:+d} stops", drop, _exposed(pixels, stops)
    yield "posters, black on white", False, _poster(width, height)
    yield "white paper with noise", True, rng.integers(250, 256, pixels.shape).astype(np.uint8)
    yield "lens cap with noise", True, rng.integers(0, 8, pixels.shape).astype(np.uint8)


def _exposed(pixels: np.ndarray, stops: int) -> np.ndarray:
    """With 2**stops times the light."""
    levels = np.arange(256) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4) * 2.0**stops
    linear = np.minimum(linear, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * curve).astype(np.uint8)[pixels]


def _poster(width: int, height: int) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height), "white")
    draw, size = ImageDraw.Draw(image), height // 12
    font = ImageFont.load_default(size)
    for line in range(8):
        draw.text((width // 12, size + line * size * 4 // 3), "THE WHOLE SALE ENDS ON FRIDAY", fill="black", font=font)
    return np.asarray(image)


def _logo(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for number in range(3):
        r, x = min(width, height) * (3 - number) / 8, width / 2
        colour = tuple(rng.integers(0, 200, 3).tolist())
        draw.ellipse((x - r, height / 2 - r, x + r, height / 2 + r), fill=colour)
    return np.asarray(image)
