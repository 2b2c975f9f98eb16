"""Made vectors with duplicates among them, and the plain way to find these: for `lens-jax bench dedup` and tests."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from lens_jax.data.engine.dedup import priority
from lens_jax.data.engine.dedup.rows import Rows
from lens_jax.data.engine.dedup.task import Task
from lens_jax.data.engine.unit import Unit, make_unit

COSINE = 0.985
WIDTH = priority.key_bytes(("id",))


def clustered(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """float16 [count, dim]: clusters of very different sizes with a common part, a twentieth of it planted beside
    others at cosines of 0.975 to 0.9999."""
    draw = np.random.default_rng(seed)
    normal = lambda *shape: draw.standard_normal(shape, np.float32) / np.float32(np.sqrt(dim))
    clusters = max(2, count // 25)
    share = 1 / np.arange(1, clusters + 1)
    which = draw.choice(clusters, count, p=share / share.sum())
    vectors = _unit(0.68 * _unit(normal(1, dim)) + 0.45 * normal(clusters, dim)[which] + 0.55 * normal(count, dim))
    copies = count // 20
    original = vectors[draw.integers(0, count - copies, copies)]
    vectors[count - copies :] = beside(original, draw.uniform(0.975, 0.9999, copies), draw)
    return vectors.astype(np.float16)


def beside(vectors: np.ndarray, cosine: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Unit vectors [n, D] at these cosines [n] to unit vectors [n, D], in a random direction."""
    away = draw.standard_normal(vectors.shape)
    away = _unit(away - (away * vectors).sum(1, keepdims=True) * vectors)
    return cosine[:, None] * vectors + np.sqrt(1 - cosine**2)[:, None] * away


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def keys(count: int, seed: int = 1) -> np.ndarray:
    """Random ids, which are the whole priority; some end in zeros, which numpy's strings do not show."""
    values = np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)
    values[::7, -2:] = 0
    return priority.as_keys(values)


class Stored(NamedTuple):
    """Reads rows of files: a unit is the rows `part` of `parts`, in their order."""

    folder: str

    def __call__(self, unit: Unit) -> Rows:
        load = lambda name: np.load(Path(self.folder) / f"{name}.npy", mmap_mode="r")
        vectors, names, sha = load("vectors"), load("keys"), load("sha256")
        index = np.array_split(np.arange(len(names)), unit.parts)[unit.part]
        return Rows(np.arange(len(index)), sha[index], names[index], vectors[index])


def store(folder: Path, vectors: np.ndarray, names: np.ndarray, sha256: np.ndarray | None = None) -> Stored:
    """Write rows for a reader; files are all different unless `sha256` S32 says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    if sha256 is None:
        sha256 = priority.as_keys(np.concatenate([priority.as_bytes(names)] * 2, 1))
    for name, values in (("vectors", vectors), ("keys", names), ("sha256", sha256)):
        np.save(folder / f"{name}.npy", values)
    return Stored(str(folder))


def make_task(folder: Path, read: Stored, units: int = 5, margin: float = 1.0, **options) -> Task:
    """A task over the rows of a reader."""
    made = tuple(make_unit("made", "rows", part, units) for part in range(units))
    return Task(made, read, folder, WIDTH, COSINE, margin, **options)


def brute_force(names: np.ndarray, vectors: np.ndarray) -> dict[tuple[bytes, bytes], float]:
    """All pairs above COSINE in float64, by their keys, the first first."""
    exact = _unit(vectors.astype(np.float64))
    names = [key.tobytes() for key in priority.as_bytes(names)]
    found = {}
    for start in range(0, len(exact), 1024):
        products = exact[start : start + 1024] @ exact.T
        for row, column in zip(*np.nonzero(products > COSINE)):
            a, b = names[start + row], names[column]
            if a < b:
                found[a, b] = float(products[row, column])
    return found


def as_set(pairs) -> set[tuple[bytes, bytes]]:
    """Pairs as `brute_force` names them."""
    first, second = (priority.as_bytes(column) for column in pairs[:2])
    return {(a.tobytes(), b.tobytes()) for a, b in zip(first, second)}
