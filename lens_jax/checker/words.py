"""Written words, read from pixels: the letters of every font are laid side by side so that they explain the ink best.

Reading is by template and knows no words, since half of those that scenes show are letters at random.
"""

import functools
import string
from dataclasses import dataclass

import numpy as np

from lens_jax.data import lettering

LETTERS = string.ascii_uppercase
# Places between two pixels at which a letter may begin.
_PHASES = 4
# What one more letter costs, in fully inked pixels: so little that it decides only where two readings are alike.
_PENALTY = 0.6 * 255**2
# Heights of a capital that are read, pixels.
_CAPITALS = (5.0, 30.0)
_LARGE = 96


@dataclass(frozen=True)
class Reading:
    """What ink says."""

    text: str
    font: str
    # Squared difference from the ink of that text, summed over the pixels, in units of 1 / 255^2 pixels.
    cost: int


def read(ink: np.ndarray) -> Reading | None:
    """The word whose letters explain the ink best; None where it is too small or too large for one.

    ink: int [H, W], 0 to 255, a box that touches the ink on all sides.
    """
    height = ink.shape[0]
    jobs = [
        (font, capital)
        for font in lettering.FONTS
        for capital in _capitals(font, height)
        if _CAPITALS[0] <= capital <= _CAPITALS[1]
    ]
    if not jobs:
        return None
    ink = np.pad(ink, ((1, 1), (2, 2))).astype(np.int64)
    templates = [_templates(font, capital, height + 2) for font, capital in jobs]
    widest = max(t.shape[2] for t, _ in templates)
    blank = np.square(ink).sum(0)
    before = np.concatenate([[0], np.cumsum(blank)])
    columns = ink.shape[1]
    # Windows [columns, (H + 2) * widest] of the ink from each column on, blank beyond its end.
    padded = np.pad(ink, ((0, 0), (0, widest))).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(padded, widest, 1)[:, :columns]
    windows = windows.transpose(1, 0, 2).reshape(columns, -1)
    costs = np.full((len(jobs), columns, len(LETTERS) * _PHASES), np.iinfo(np.int64).max // 4)
    widths = np.zeros((len(jobs), len(LETTERS) * _PHASES), np.int64)
    for job, (template, width) in enumerate(templates):
        full = np.zeros((*template.shape[:2], widest))
        full[..., : template.shape[2]] = template
        flat = full.reshape(len(full), -1)
        ends = np.minimum(np.arange(columns)[:, None] + width, columns)
        energy = before[ends] - before[:columns, None]
        costs[job] = energy - 2 * (windows @ flat.T).astype(np.int64) + np.square(flat).sum(1).astype(np.int64)
        widths[job] = width
    texts = _best(costs + int(_PENALTY), widths, blank)
    job = int(np.argmin([cost for cost, _ in texts]))
    cost, text = texts[job]
    return Reading(text, jobs[job][0], int(cost - int(_PENALTY) * len(text)))


def _best(costs: np.ndarray, widths: np.ndarray, blank: np.ndarray) -> list[tuple[int, str]]:
    """The cheapest rows of letters, by job, with their cost.

    costs: int64 [J, X, L] of letter l from column x on; widths: [J, L]; blank: [X], the cost of a column without any.
    """
    jobs, columns, letters = costs.shape
    best = np.zeros((columns + 1, jobs), np.int64)
    choice = np.full((columns + 1, jobs), -1)
    all_jobs, every = np.arange(jobs)[:, None], np.arange(letters)[None]
    for x in range(1, columns + 1):
        start = x - widths
        legal = start >= 0
        start = np.maximum(start, 0)
        totals = best[start, all_jobs] + costs[all_jobs, start, every]
        totals = np.where(legal, totals, np.iinfo(np.int64).max)
        letter = totals.argmin(1)
        with_letter, without = totals[np.arange(jobs), letter], best[x - 1] + blank[x - 1]
        choice[x] = np.where(with_letter < without, letter, -1)
        best[x] = np.minimum(with_letter, without)
    found = []
    for job in range(jobs):
        x, text = columns, []
        while x > 0:
            letter = choice[x, job]
            if letter >= 0:
                text.append(LETTERS[letter // _PHASES])
            x -= widths[job, letter] if letter >= 0 else 1
        found.append((int(best[columns, job]), "".join(reversed(text))))
    return found


def _capitals(font: str, height: int) -> tuple[float, ...]:
    """Heights that a capital may have where the ink has this one: round letters rise above it, a Q falls below."""
    _, tail, rise = _metrics(font)
    options = {height, height - 0.5, round(2 * height / (1 + 2 * rise)) / 2, round(2 * height / (1 + tail)) / 2}
    return tuple(sorted(options))


@functools.cache
def _metrics(font: str) -> tuple[int, float, float]:
    """Height of an H drawn large, and how far a Q falls below it and an O rises above, as parts of that."""
    _, top, _, bottom = lettering._face(font).getbbox("H")
    _, _, _, tail = lettering._face(font).getbbox("Q")
    _, rise, _, _ = lettering._face(font).getbbox("O")
    return bottom - top, (tail - bottom) / (bottom - top), (top - rise) / (bottom - top)


@functools.lru_cache(maxsize=512)
def _templates(font: str, capital: float, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The letters at a height of capitals in pixels: float64 [26 * _PHASES, rows, W], and their widths in columns.

    Whole numbers from 0 to 255. A capital's upper edge is that of the second row.
    """
    from PIL import Image, ImageDraw

    face = lettering._face(font)
    _, top, _, base = face.getbbox("H")
    scale = (base - top) / capital
    images, widths = [], []
    first = _LARGE + top - scale
    for letter in LETTERS:
        left, _, right, _ = face.getbbox(letter)
        large = Image.new("L", (right - left + 8 * int(scale + 1), 4 * _LARGE))
        ImageDraw.Draw(large).text((4 * int(scale + 1) - left, _LARGE), letter, fill=255, font=face)
        for phase in range(_PHASES):
            columns = int(np.ceil((right - left) / scale + phase / _PHASES))
            x = 4 * int(scale + 1) - scale * phase / _PHASES
            box = (x, first, x + scale * columns, first + scale * rows)
            images.append(np.asarray(large.resize((columns, rows), Image.Resampling.LANCZOS, box=box)))
            widths.append(columns)
    stacked = np.zeros((len(images), rows, max(widths)))
    for i, image in enumerate(images):
        stacked[i, :, : image.shape[1]] = image
    return stacked, np.array(widths)
