"""Adapters as a user names them; what they are and how they are loaded is in `posttraining.adapters`."""

import math
from pathlib import Path

import numpy as np

from lens_jax.errors import LensError
from lens_jax.posttraining.adapters import Loaded as Loaded
from lens_jax.posttraining.adapters import add_full as add_full
from lens_jax.posttraining.adapters import joined as joined
from lens_jax.posttraining.adapters import merge as merge
from lens_jax.posttraining.adapters import place as place
from lens_jax.posttraining.adapters import read as read
from lens_jax.posttraining.adapters import read_run as read_run
from lens_jax.posttraining.adapters import run_config as run_config


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
