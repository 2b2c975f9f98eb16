"""What an image shows, from its pixels alone: background, objects with their places and sizes, written words.

The image is explained by pictograms and words on a plain background. A rectangle around what is painted is one
pictogram, one word, or is cut in two by a straight line, each part being explained alike; of all the explanations tried
the one that leaves the least squared difference is taken. So a sun stays one in spite of its rays, and two pandas that
touch are two. Nothing is learned: the references are renderings. Nothing is random, and all sums are of whole numbers.
"""

from dataclasses import dataclass

import numpy as np

from lens_jax.checker.references import (
    CELLS,
    PAINTED,
    References,
    cell_means,
    integral,
    load_references,
    painted_box,
)
from lens_jax.checker.words import Reading, read
from lens_jax.data.lettering import INK
from lens_jax.data.scenes import COLOURS, Box

# A background farther than this from every colour of COLOURS has no name; two of those are at least 38 apart.
_BACKGROUND = 30
# Share of a pictogram's energy (squared difference from the background) that may stay unexplained.
UNKNOWN = 0.45
# Below this share no other explanation is looked for.
_CERTAIN = 0.1
# As UNKNOWN, for the ink of a word.
UNREADABLE = 0.5
# Share of a region's energy that may lie off the line from the background to the ink, for it to be read.
_COLOURED = 0.12
# What one more object costs, in squared difference: some six pixels of ink. The faintest pictogram has four times that.
_PENALTY = 1_000_000
# Sides of what can be a pictogram, pixels; scenes have none below 20.
_SMALLEST = 14
# Squared distance from the background of what belongs to an object even where it is blurred; see PAINTED.
_STRONG = 90**2
# What is like nothing and has fewer painted pixels outside of all objects is a speck; a pictogram of a scene has more.
_SPECK = 50
# Least extent of what is cut off, pixels.
_LEAST = 5
_CUTS = 4
_DEPTH = 3


@dataclass(frozen=True)
class Found:
    """One object of an image."""

    # A concept's id; "" where it is like none.
    concept: str
    # Square it is drawn in, by its reference; around what is painted where it is like none.
    box: Box
    # Share of its energy that the reference leaves unexplained.
    error: float

    @property
    def side(self) -> int:
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class FoundWord:
    """A written word of an image."""

    text: str
    font: str
    # Box around its ink.
    box: Box
    error: float


@dataclass(frozen=True)
class Seen:
    """What an image shows."""

    # A name of COLOURS; "" where it is none of them.
    background: str
    objects: tuple[Found, ...]
    words: tuple[FoundWord, ...]
    # Pixels.
    height: int
    width: int


@dataclass(frozen=True)
class _Part:
    """A way to explain a region."""

    # Squared difference left.
    cost: float
    box: Box
    # Concept, or -1 for unknown; the row of its description.
    concept: int = -1
    row: int = -1
    error: float = 1.0
    word: Reading | None = None
    # Concepts by how alike they are, the first and those close to it.
    rivals: tuple[int, ...] = ()


def look(image: np.ndarray, references: References | None = None) -> Seen:
    """What a uint8 [H, W, 3] image shows."""
    references = references or load_references()
    name, colour, noise = background(image)
    difference = image.astype(np.int32) - colour
    distance = np.square(difference).sum(-1)
    mask = _without_specks(distance >= max(PAINTED, 2 * noise))
    box = painted_box(mask)
    objects: list[Found] = []
    words: list[FoundWord] = []
    if box:
        search = _Search(references, name or _nearest(colour), colour, difference, mask)
        parts = search.explain(box, _DEPTH)[1]
        words = [FoundWord(p.word.text, p.word.font, p.box, round(p.error, 4)) for p in parts if p.word]
        found = [search.refine(part) for part in parts if not part.word]
        objects = [one for one in found if one.concept or search.unexplained(one, found) >= _SPECK]
    order = lambda found: (found.box[1], found.box[0])
    return Seen(name, tuple(sorted(objects, key=order)), tuple(sorted(words, key=order)), *image.shape[:2])


def background(image: np.ndarray) -> tuple[str, np.ndarray, int]:
    """The name of the colour that most of the border has ("" for none), the median there of those pixels, and the
    squared distance from it that one of twenty exceeds."""
    border = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3)])
    border = np.concatenate([border, image[2:-2, :2].reshape(-1, 3), image[2:-2, -2:].reshape(-1, 3)]).astype(np.int32)
    palette = np.array(list(COLOURS.values()), np.int32)
    distances = np.square(border[:, None] - palette).sum(-1)
    near = distances.min(1) <= _BACKGROUND**2
    votes = np.bincount(distances[near].argmin(1), minlength=len(palette))
    if 4 * votes.max() >= len(border):
        same = border[near][distances[near].argmin(1) == votes.argmax()]
        colour = np.sort(same, 0)[len(same) // 2]
        noise = np.sort(np.square(same - colour).sum(1))[19 * len(same) // 20]
        return list(COLOURS)[votes.argmax()], colour, int(noise)
    return "", np.sort(border, 0)[len(border) // 2], 0


def _nearest(colour: np.ndarray) -> str:
    return list(COLOURS)[int(np.square(np.array(list(COLOURS.values())) - colour).sum(1).argmin())]


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """Without the pixels that have fewer than two painted neighbours of eight."""
    padded = np.pad(mask, 1).astype(np.int8)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return mask & (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] >= 3)


def _certain(part: _Part) -> bool:
    """Whether no other explanation of it is looked for."""
    return part.error < (UNREADABLE / 4 if part.word else _CERTAIN)


class _Search:
    """The explanations of one image."""

    def __init__(self, references: References, name: str, colour: np.ndarray, difference: np.ndarray, mask: np.ndarray):
        self.references, self.colour, self.difference, self.mask = references, colour, difference, mask
        self.described = references.descriptors(name)
        self.sums = integral(difference)
        distance = np.square(difference).sum(-1)
        self.strong = mask & (distance >= _STRONG)
        self.energy = integral(distance[..., None])[..., 0]
        ink = np.array(INK) - colour
        # How far from the background to the ink a pixel is, in 255ths, and the squared distance from that line.
        self.ink_energy = int(np.square(ink).sum())
        along = difference @ ink
        self.ink = np.clip((2 * 255 * along + self.ink_energy) // (2 * self.ink_energy), 0, 255)
        off = np.square(255 * difference - self.ink[..., None] * ink).sum(-1, keepdims=True) // 255**2
        self.coloured = integral(off)[..., 0]
        self.parts: dict[Box, _Part] = {}
        self.explained: dict[tuple[Box, int], tuple[float, tuple[_Part, ...]]] = {}

    def explain(self, box: Box, depth: int) -> tuple[float, tuple[_Part, ...]]:
        """The cheapest explanation of a box that fits tightly around what is painted."""
        if (box, depth) not in self.explained:
            self.explained[box, depth] = self._explain(box, depth)
        return self.explained[box, depth]

    def _explain(self, box: Box, depth: int) -> tuple[float, tuple[_Part, ...]]:
        part = self._match([box])[0]
        if part.error >= _CERTAIN:
            part = self._read(part)
        best = part.cost, (part,)
        if _certain(part) or not depth:
            return best
        cuts = [(crossing, self._halves(box, axis, place)) for crossing, axis, place in self._cuts(box)]
        cuts = [(crossing, pair) for crossing, pair in cuts if pair]
        if not cuts:
            return best
        self._match([half for _, pair in cuts for half in pair])
        # Lines through nothing first: a word is known as one only when it is looked at by itself.
        cuts.sort(key=lambda cut: (cut[0] > 0, sum(self.parts[half].cost for half in cut[1])))
        for _, pair in cuts[:_CUTS]:
            first = self.explain(pair[0], depth - 1)
            if first[0] + _PENALTY >= best[0]:  # the second half costs that at least, so it need not be looked at
                continue
            second = self.explain(pair[1], depth - 1)
            if first[0] + second[0] < best[0]:
                best = first[0] + second[0], first[1] + second[1]
            if all(map(_certain, best[1])):
                break
        return best

    def _match(self, boxes: list[Box]) -> list[_Part]:
        new = [box for box in dict.fromkeys(boxes) if box not in self.parts]
        if new:
            # Blur and what JPEG leaves widen a box: it is what its strong pixels are where that is more like something.
            inner = {box: self._tight(box, self.strong) or box for box in new}
            every = list(dict.fromkeys([*new, *inner.values()]))
            parts = dict(zip(every, self._parts(np.array(every))))
            for box, strong in inner.items():
                self.parts[box] = min(parts[box], parts[strong], key=lambda part: part.error)
        return [self.parts[box] for box in boxes]

    def _parts(self, boxes: np.ndarray) -> list[_Part]:
        """Each box as one pictogram, or as something unknown."""
        means = cell_means(self.sums, boxes)
        reference = self.described
        inner = (means.astype(np.float64) @ reference.values.T).astype(np.int64)
        distances = np.square(means).sum(1)[:, None] - 2 * inner + reference.norms
        size = boxes[:, 2:] - boxes[:, :2]
        shape = reference.boxes[:, 2:] - reference.boxes[:, :2]
        # The square that each pictogram would fill, and by how much the box differs from what would be painted in it.
        side = (size[:, None] / shape).max(-1)
        misfit = (side[..., None] * shape - size[:, None]).max(-1)
        distances = np.where(misfit <= 2.5 + 0.12 * side, distances, np.int64(2) ** 60)
        errors = distances / reference.norms
        area = size.prod(1)
        parts = []
        for box, error, distance, sides, pixels in zip(
            map(tuple, boxes.tolist()), errors, distances, side, area.tolist()
        ):
            row = int(distance.argmin())
            left = int(distance[row]) * pixels / CELLS**2
            energy = self._within(self.energy, box)
            if error[row] < UNKNOWN and sides[row] >= _SMALLEST:
                ids = len(self.references.ids)
                rivals = dict.fromkeys(int(i) % ids for i in distance.argsort(kind="stable")[:6])
                near = [k for k in rivals if min(distance[k::ids]) <= 2 * distance[row] + 0.04 * reference.norms[row]]
                part = _Part(left + _PENALTY, box, row % ids, row, float(error[row]), rivals=tuple(near[:4]))
            else:
                part = _Part(0.8 * energy + _PENALTY, box)
            parts.append(part)
        return parts

    def _read(self, part: _Part) -> _Part:
        """The part as a word, where it is all ink and that explains it better."""
        energy = self._within(self.energy, part.box)
        left, top, right, bottom = part.box
        wide = right - left >= 1.2 * (bottom - top) and bottom - top >= 5
        coloured = self._within(self.coloured, part.box)
        if not wide or coloured > _COLOURED * energy:
            return part
        ink = self.ink[top:bottom, left:right]
        word = read(ink)
        if not word or len(word.text) < 2:
            return part
        error = word.cost / int(np.square(ink).sum())
        cost = word.cost * self.ink_energy / 255**2 + coloured + _PENALTY
        return _Part(cost, part.box, error=error, word=word) if error < UNREADABLE and cost < part.cost else part

    def _within(self, sums: np.ndarray, box: Box) -> int:
        left, top, right, bottom = box
        return int(sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left])

    def _cuts(self, box: Box) -> list[tuple[int, int, int]]:
        """(painted pixels crossed, axis, place) of lines through few painted pixels."""
        left, top, right, bottom = box
        mask = self.mask[top:bottom, left:right]
        cuts = []
        for axis, inside in ((0, mask.T), (1, mask)):  # a vertical line between columns, a horizontal one between rows
            length = len(inside)
            crossing = (inside[:-1] & inside[1:]).sum(1)
            gaps = inside.sum(1)[:-1] + inside.sum(1)[1:]
            places = np.arange(1, length)
            legal = (places >= _LEAST) & (places <= length - _LEAST)
            # Few crossings, then few painted pixels beside it, then the middle.
            worth = crossing * 10_000 + gaps * 100 + abs(2 * places - length)
            chosen: list[tuple[int, int]] = []
            for i in np.argsort(worth, kind="stable"):
                if len(chosen) == 3 or crossing[i] * 3 > inside.shape[1]:
                    break
                if legal[i] and all(abs(places[i] - other) > 3 for _, other in chosen):
                    chosen.append((int(crossing[i]), int(places[i])))
            # Two that touch along a whole side, such as books, have no line between them that crosses little.
            middle = np.flatnonzero(legal & (abs(2 * places - length) <= 6))
            if len(middle):
                i = middle[worth[middle].argmin()]
                if all(abs(places[i] - other) > 3 for _, other in chosen):
                    chosen.append((int(crossing[i]), int(places[i])))
            cuts += [(crossed, axis, (left, top)[axis] + place) for crossed, place in chosen]
        return cuts

    def _halves(self, box: Box, axis: int, place: int) -> tuple[Box, ...] | None:
        left, top, right, bottom = box
        parts = ((left, top, place, bottom), (place, top, right, bottom))
        if axis:
            parts = ((left, top, right, place), (left, place, right, bottom))
        found = [tight for tight in (self._tight(part, self.mask) for part in parts) if tight]
        return tuple(found) if len(found) == 2 else None

    def _tight(self, box: Box, mask: np.ndarray) -> Box | None:
        """The box around what is true in the mask within a box; None where nothing is."""
        left, top, right, bottom = box
        inner = painted_box(mask[top:bottom, left:right])
        return inner and (left + inner[0], top + inner[1], left + inner[2], top + inner[3])

    def refine(self, part: _Part) -> Found:
        """The concept, square and error of a part, by its references pixel by pixel at sides and places around it."""
        if part.concept < 0:
            return Found("", part.box, 1.0)
        best = None
        for concept in part.rivals or (part.concept,):
            left, top, right, bottom = self.described.boxes[concept + len(self.references.ids)]
            found_left, found_top, found_right, found_bottom = part.box
            width, height = found_right - found_left, found_bottom - found_top
            wide = right - left >= bottom - top
            guess = width / (right - left) if wide else height / (bottom - top)
            centre = (found_left + found_right) / 2, (found_top + found_bottom) / 2
            middle = (left + right) / 2, (top + bottom) / 2
            for side in sorted({round(guess) + change for change in (-1, 0, 1)}):
                place = tuple(round(c - m * side) for c, m in zip(centre, middle))
                candidate = self._compare(concept, side, *place)
                best = candidate if best is None or candidate < best else best
        for _ in range(3):
            _, concept, side, x, y = best
            around = [
                (side + change, x + dx, y + dy)
                for change in (-1, 0, 1)
                for dx in (-1, 0, 1)
                for dy in (-1, 0, 1)
                if (change, dx, dy) != (0, 0, 0)
            ]
            better = min(self._compare(concept, *options) for options in around)
            if better >= best:
                break
            best = better
        error, concept, side, x, y = best
        if error >= UNKNOWN:
            return Found("", part.box, round(error, 4))
        return Found(self.references.ids[concept], (x, y, x + side, y + side), round(error, 4))

    def unexplained(self, unknown: Found, found: list[Found]) -> int:
        """Painted pixels of what is like nothing that lie outside of the squares of all that is something."""
        left, top, right, bottom = unknown.box
        rest = self.mask.copy()
        for other in found:
            if other.concept:
                x, y, x_end, y_end = (max(0, edge) for edge in other.box)
                rest[y:y_end, x:x_end] = False
        return int(rest[top:bottom, left:right].sum())

    def _compare(self, concept: int, side: int, x: int, y: int) -> tuple[float, int, int, int, int]:
        """(error, concept, side, left, top): what a reference in that square leaves unexplained there."""
        height, width = self.mask.shape
        left, top, right, bottom = max(0, x), max(0, y), min(width, x + side), min(height, y + side)
        if side < 4 or right <= left or bottom <= top:
            return (np.inf, concept, side, x, y)
        reference = self.references.composed(concept, side, self.colour) - self.colour
        energy = int(np.square(reference).sum())
        shown = reference[top - y : bottom - y, left - x : right - x]
        rest = int(np.square(self.difference[top:bottom, left:right] - shown).sum())
        # What lies beyond the image is not explained, and counts as if nothing were there.
        rest += energy - int(np.square(shown).sum())
        return (rest / energy, concept, side, x, y)
