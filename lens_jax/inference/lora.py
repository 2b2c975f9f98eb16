"""Adapters as a user names them, with a scale; how they are loaded is in `posttraining.adapters`."""

import math
from pathlib import Path

import numpy as np

from lens_jax.errors import LensError


def parse(place: str) -> tuple[str, float]:
    """(path, scale) of FILE[:scale]; the scale is 1 where there is none."""
    path, colon, number = place.rpartition(":")
    if not colon or Path(place).exists() or number.startswith("//"):
        return place, 1.0
    try:
        scale = float(number)
    except ValueError:
        return place, 1.0  # a colon of the path
    return path, check_scale(scale)


def check_scale(scale: float) -> float:
    real = isinstance(scale, int | float | np.integer | np.floating) and not isinstance(scale, bool)
    if not real or not math.isfinite(scale):
        raise LensError(f"the scale of an adapter is {scale!r:.60}; it must be a finite number")
    return float(scale)
