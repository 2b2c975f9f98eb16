"""`lens-jax bench copies`: at which cosine an embedding tells copies of an image from other images.

Copies are made of the images of a folder as they are found in collections: compressed again, resized, cropped, with a
logo. The recall of each kind and the pairs of different images that are taken for copies are counted at thresholds.
"""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lens_jax.bench import measure
from lens_jax.data.engine.decode import Undecodable, decode
from lens_jax.data.engine.scorers import layout
from lens_jax.data.engine.scorers.scorer import Scorer
from lens_jax.data.prepare_report import progress
from lens_jax.data.sources.folder import SUFFIXES
from lens_jax.errors import LensError

_THRESHOLDS = (0.85, 0.88, 0.9, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99)


@dataclasses.dataclass(frozen=True)
class CopiesBench:
    """Recall of planted copies by an embedding, and its false pairs, at several thresholds."""

    # A folder of different images.
    images: str
    # "layout", or a release folder of CLIP ViT-L/14.
    embedding: str = layout.NAME
    # Images to use, in the order of their names; 0 uses all.
    count: int = 0
    # Images below this many pixels are left out; the longer side of others is shrunk to at most this many first.
    least_area: int = 64 * 64
    side: int = 768
    # The least share of pairs above the threshold that has to be right: the threshold that is proposed has it.
    precision: float = 0.99
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "least_area", "side")
        if not 0 < self.precision <= 1:
            raise LensError(f"--precision is {self.precision}; it must be above 0 and at most 1")


def jpeg50(image: Image.Image) -> Image.Image:
    """Compressed at quality 50."""
    data = io.BytesIO()
    image.save(data, "jpeg", quality=50)
    return Image.open(data).convert("RGB")


def crop(image: Image.Image) -> Image.Image:
    """4 % of the width and of the height are cut off at the left and at the top."""
    return image.crop((round(0.04 * image.width), round(0.04 * image.height), image.width, image.height))


def resize(image: Image.Image) -> Image.Image:
    """Half the size."""
    return image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BICUBIC)


def logo(image: Image.Image) -> Image.Image:
    """A white plate with a dark ring in the lower right corner, 18 % of the shorter side."""
    image = image.copy()
    side, edge = 0.18 * min(image.size), 0.03 * min(image.size)
    right, bottom = image.width - edge, image.height - edge
    pen = ImageDraw.Draw(image)
    pen.rectangle((right - side, bottom - side, right, bottom), "white")
    inside = 0.2 * side
    pen.ellipse(
        (right - side + inside, bottom - side + inside, right - inside, bottom - inside),
        outline=(20, 20, 60), width=max(1, round(side / 8)),
    )  # fmt: skip
    return image


def all_of_them(image: Image.Image) -> Image.Image:
    """Cropped, with a logo, half the size, compressed."""
    return jpeg50(resize(logo(crop(image))))


KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg q50": jpeg50, "crop 4 %": crop, "half size": resize, "logo": logo, "all four": all_of_them,
}  # fmt: skip


def bench_copies(bench: CopiesBench) -> dict:
    """Make the copies, embed all, count pairs, print and return the figures."""
    scorer = _scorer(bench.embedding)
    originals, copies = _embedded(bench, scorer)
    result = figures(originals, copies, bench.precision)
    return measure.report(bench, {"embedding": scorer.name, **result})


def figures(originals: np.ndarray, copies: dict[str, np.ndarray], precision: float) -> dict:
    """Of unit vectors [n, D] of different images, and of a copy of each [n, D] by kind.

    At each threshold: recall by kind, the precision of all pairs of an original and a copy above it, and the pairs of
    different originals above it.
    """
    count = len(originals)
    among = (originals @ originals.T)[np.triu_indices(count, 1)]
    right = {kind: np.einsum("nd,nd->n", originals, vectors) for kind, vectors in copies.items()}
    products = {kind: originals @ vectors.T for kind, vectors in copies.items()}
    result: dict = {"images": count, "pairs of different images": len(among)}
    proposed = None
    for threshold in _THRESHOLDS:
        recall = {kind: float(np.mean(values > threshold)) for kind, values in right.items()}
        true = sum(int(np.count_nonzero(values > threshold)) for values in right.values())
        false = sum(int(np.count_nonzero(values > threshold)) for values in products.values()) - true
        false_originals = int(np.count_nonzero(among > threshold))
        share = true / max(true + false, 1)
        shown = ", ".join(f"{kind} {value:.3f}" for kind, value in recall.items())
        result[f"at {threshold}"] = (
            f"{shown}; precision {share:.4f}; {false_originals} pairs of originals ({false_originals / len(among):.1e})"
        )
        if proposed is None and share >= precision:
            proposed = threshold
    result["least threshold of that precision"] = "none" if proposed is None else proposed
    return result


def _scorer(name: str) -> Scorer:
    if name == layout.NAME:
        return layout.load()
    from lens_jax.data.engine.scorers import embedding

    return embedding.load(name, "float32")


def _embedded(bench: CopiesBench, scorer: Scorer) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    folder = Path(bench.images)
    if not folder.is_dir():
        raise LensError(f"--images {bench.images}: no such folder")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    rows: list[list[np.ndarray]] = []
    for path in progress(paths, len(paths), "copies", True):
        try:
            image = Image.fromarray(decode(path.read_bytes()))
        except Undecodable:
            continue
        if image.width * image.height < bench.least_area:
            continue
        image.thumbnail((bench.side, bench.side), Image.Resampling.BOX)
        made = [image, *(make(image) for make in KINDS.values())]
        vectors = scorer.score(np.stack([scorer.prepare(np.asarray(one)) for one in made]))["embedding"]
        if vectors[0].any():
            rows.append(vectors)
        if len(rows) == bench.count:
            break
    if len(rows) < 2:
        raise LensError(
            f"--images {bench.images}: fewer than two images of {bench.least_area} pixels that can be decoded"
        )
    originals, *copies = np.stack(rows, 1)
    return originals, dict(zip(KINDS, copies))
