"""Small copies of images for the page, as data URIs."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from lens_jax.data import images
from lens_jax.data.engine import readers
from lens_jax.data.engine.config import EngineConfig
from lens_jax.data.engine.report.gather import Example, Gathered
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError

SIDE = 96


def wanted(found: Gathered) -> Mapping[int, set[int]]:
    """Indices of the images to show, by the number of their unit."""
    lists: list[Iterable[Example]] = [*found.examples.values(), *found.groups.values(), found.kept_of_group.values()]
    places: dict[int, set[int]] = {}
    for examples in lists:
        for example in examples:
            places.setdefault(example.unit, set()).add(example.index)
    return places


def make(
    config: EngineConfig, units: Sequence[Unit], places: Mapping[int, set[int]], track=iter
) -> dict[tuple[int, int], str]:
    """Data URIs by (number of the unit, index). What cannot be drawn is left out."""
    uris = {}
    for number, indices in track(sorted(places.items())):
        unit = units[number]
        last = max(indices)
        for index, item in enumerate(readers.read(config.source(unit.source), unit)):
            if index in indices and isinstance(item, readers.Item):
                uri = _draw(item.data, item.key)
                if uri:
                    uris[number, index] = uri
            if index == last:
                break
    return uris


def _draw(data: bytes, key: str) -> str | None:
    try:
        image = images.open_image(data, key)
    except LensError:
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def figure(example: Example, uris: Mapping, text: str) -> str:
    """An image of the page with its value; its key is shown when it is pointed at."""
    uri = uris.get((example.unit, example.index))
    title = html.escape(f"{example.key}\n{example.id.hex()}", quote=True)
    shown = f'<img src="{uri}" alt="">' if uri else '<div class="none">not drawn</div>'
    return f'<figure title="{title}">{shown}<figcaption>{html.escape(text)}</figcaption></figure>'
