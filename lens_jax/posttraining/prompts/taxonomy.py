"""What a prompt set is about: items by category, and for each prompt the dimensions that it pins down."""

import dataclasses
import hashlib
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lens_jax.errors import LensError

# The report's dimensions; a prompt pins down one to four of them (report section 4).
DIMENSIONS = ("Attribute", "Spatial Relationship", "Count", "Interaction", "Color")
MOST_DIMENSIONS = 4
# Of prompts in these categories the text in the image is one more. The report lists text among the key points of its
# prompts, and scores it by rubrics of their own; which prompts have it, it does not say.
TEXT = "Text"
_TEXT_CATEGORIES = ("Text", "UI and Graphic Design")

PACKAGED = Path(__file__).with_name("taxonomy.toml")


@dataclasses.dataclass(frozen=True)
class Item:
    """Something to write prompts about."""

    category: str
    subcategory: str
    item: str


@dataclasses.dataclass(frozen=True)
class Task:
    """One prompt to be written."""

    # "animal/birds/barn-owl/0"
    id: str
    item: Item
    dimensions: tuple[str, ...]


def read_taxonomy(path: str | os.PathLike = PACKAGED) -> list[Item]:
    """The items of a TOML file of [category] tables with `sub-category = [items]`, in its order."""
    try:
        with open(path, "rb") as file:
            tables = tomllib.load(file)
    except FileNotFoundError:
        raise LensError(f"{path}: no such file") from None
    except OSError as error:
        raise LensError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LensError(f"{path}: not TOML ({error})") from None
    items = []
    for category, table in tables.items():
        if not isinstance(table, dict):
            raise LensError(f"{path}: {category!r:.60} is no table; expected [category] with sub-category = [items]")
        for subcategory, names in table.items():
            where = f"{path}: [{category}] {subcategory!r:.60}"
            if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
                raise LensError(f"{where}: expected a list of texts")
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise LensError(f"{where}: {twice!r:.60} is there twice")
            items += [Item(category, subcategory, name) for name in names]
    if not items:
        raise LensError(f"{path}: no items; expected [category] tables with sub-category = [items]")
    return items


def make_tasks(items: Sequence[Item], per_item: int, seed: int) -> list[Task]:
    """`per_item` prompts of each item, every one with one to four dimensions of its own drawing.

    A task depends on the seed and its own id alone: an item more or less changes no other. No two prompts of an item
    have the same dimensions, as long as there are sets left (30).
    """
    tasks, taken = [], set()
    for item in items:
        stem = "/".join(_slug(part) for part in (item.category, item.subcategory, item.item))
        while stem in taken:  # names that differ in punctuation only
            stem += "-"
        taken.add(stem)
        seen: list[tuple[str, ...]] = []
        for number in range(per_item):
            rng = np.random.default_rng(_number(f"{seed}/{stem}/{number}"))
            dimensions = _draw(rng)
            while dimensions in seen and len(seen) < 30:
                dimensions = _draw(rng)
            seen.append(dimensions)
            extra = (TEXT,) if item.category in _TEXT_CATEGORIES else ()
            tasks.append(Task(f"{stem}/{number}", item, dimensions + extra))
    return tasks


def _draw(rng: np.random.Generator) -> tuple[str, ...]:
    count = rng.integers(1, MOST_DIMENSIONS + 1)
    return tuple(DIMENSIONS[i] for i in sorted(rng.choice(len(DIMENSIONS), count, replace=False)))


def order_of(seed: int, id: str) -> int:
    """Where a prompt stands in the order that sub-sets are taken by; of the seed and the id alone."""
    return _number(f"{seed}/{id}")


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big")


def _slug(text: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in text.casefold()).split()
    return "-".join(words)[:60] or "x"
