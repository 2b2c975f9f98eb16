"""Colours by name, and how far two are apart: the contrast ratio of WCAG 2.2, 1 to 21."""

import functools
from typing import NamedTuple

import numpy as np

# Names that people agree on; what is drawn lies so close to one of these that its name holds.
COLOURS = {
    "black": (16, 16, 18),
    "dark grey": (70, 70, 74),
    "light grey": (200, 200, 204),
    "white": (250, 250, 250),
    "red": (206, 24, 36),
    "dark red": (118, 12, 22),
    "orange": (242, 130, 20),
    "yellow": (250, 216, 36),
    "beige": (236, 222, 192),
    "brown": (110, 66, 32),
    "green": (36, 150, 60),
    "dark green": (14, 74, 38),
    "turquoise": (32, 180, 172),
    "light blue": (136, 194, 242),
    "blue": (28, 88, 212),
    "navy blue": (16, 30, 92),
    "purple": (118, 44, 158),
    "pink": (244, 130, 178),
}
_NAMES = tuple(COLOURS)
_SPREAD = 9
# Weights of linear red, green and blue in relative luminance.
_LUMINANCE = (0.2126, 0.7152, 0.0722)


@functools.cache
def _linear() -> np.ndarray:
    """float64 [256]: an sRGB value as an amount of light, 0 to 1."""
    value = np.arange(256) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


@functools.cache
def _linear_table() -> list[int]:
    return [round(255 * value) for value in _linear()] * 3


def luminance(pixels: np.ndarray) -> np.ndarray:
    """Relative luminance, 0 to 1, [...] of uint8 sRGB [..., 3]."""
    return _linear()[pixels] @ np.array(_LUMINANCE)


def contrast(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    """Contrast ratio of two relative luminances."""
    high, low = np.maximum(a, b), np.minimum(a, b)
    return (high + 0.05) / (low + 0.05)


def tenth(values: np.ndarray) -> float:
    """What nine in ten of the values reach; ten times as fast as numpy's quantile, which interpolates."""
    number = len(values) // 10
    return float(np.partition(values, number)[number])


def luminance_image(image):
    """Relative luminance of a PIL image of mode RGB, as one of mode L whose 255 is 1."""
    return image.point(_linear_table()).convert("L", (*_LUMINANCE, 0))


class Colour(NamedTuple):
    """uint8 sRGB, and a name that it bears."""

    name: str
    rgb: tuple[int, int, int]

    @property
    def luminance(self) -> float:
        return float(luminance(np.array(self.rgb)))


def draw_colour(rng: np.random.Generator) -> Colour:
    """Any colour."""
    return near(_NAMES[rng.integers(len(_NAMES))], rng)


def near(name: str, rng: np.random.Generator) -> Colour:
    """A colour of that name."""
    moved = np.array(COLOURS[name]) + rng.integers(-_SPREAD, _SPREAD + 1, 3)
    return Colour(name, tuple(int(value) for value in np.clip(moved, 0, 255)))
