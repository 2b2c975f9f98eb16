"""What a part is made of, and what it is told."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a child is told; plain values, since it travels as JSON."""

    # Full size, or one that a CPU runs in seconds.
    size: Literal["lens", "tiny"]
    # The part's name: several may share a module.
    part: str
    # Folder of the results, where a profile goes.
    out: str
    # Folder of the golden release; empty is none.
    golden: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement. What it returns are JSON values; it may raise, and the next case still runs."""

    name: str
    run: Callable[[], dict[str, Any]]
    # Not begun with fewer seconds left.
    least: float = 10
    # Ended, with its process, after so many seconds.
    most: float = 90
