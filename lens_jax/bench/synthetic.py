"""`lens-jax bench synthetic`: images of text a second of one core."""

import dataclasses
import importlib
import io
import time
from pathlib import Path
from typing import Literal

from lens_jax.bench import measure
from lens_jax.data.engine.config import EngineConfig, Source, Synthetic
from lens_jax.data.engine.synthetic.draw import synthesize
from lens_jax.data.engine.synthetic.materials import Materials, load_materials
from lens_jax.data.lettering import FONTS
from lens_jax.errors import LensError


@dataclasses.dataclass(frozen=True)
class SyntheticBench:
    """Images of rendered text at each size, drawn and encoded in one thread."""

    # Roots of the area, in pixels; shapes are those of the report.
    sizes: tuple[int, ...] = (512, 1024)
    # Images of each size.
    count: int = 48
    # Font files, folders or patterns; by default three that the extra `demo` brings.
    fonts: tuple[str, ...] = ()
    # Files of strings, one a line.
    texts: tuple[str, ...] = ()
    # Images, folders of them, or data sets to write on.
    backgrounds: tuple[str, ...] = ()
    # Languages of numbers, prices and dates.
    locales: tuple[str, ...] = ("en",)
    style: Literal["augmented", "plain"] = "augmented"
    # How images are stored.
    encoding: Literal["jpeg", "png", "webp"] = "jpeg"
    # Of what is drawn.
    seed: int = 0
    # Also write the first 24 images of the first size as one image here, a PNG or JPEG, each at most 220 pixels wide,
    # and print their captions.
    sheet: str = ""
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "count")
        if not self.sizes:
            raise LensError("--sizes is empty; name at least one, such as 512")


def bench_synthetic(bench: SyntheticBench) -> dict:
    """Draws `count` images of each size; seconds are those of the processor, so that other work does not count."""
    result: dict[str, float | int | str] = {"images": bench.count, "style": bench.style}
    for size in bench.sizes:
        started = time.process_time()
        materials = _materials(bench, size)
        result["fonts"] = len(materials.fonts)
        result["load_cpu_seconds"] = time.process_time() - started
        synthesize(bench.seed, bench.count, materials)  # opens what is opened once
        started = time.process_time()
        sizes = [len(synthesize(bench.seed, index, materials).image) for index in range(bench.count)]
        seconds = time.process_time() - started
        result[f"{size}_images_per_second_and_core"] = bench.count / seconds
        result[f"{size}_milliseconds"] = 1e3 * seconds / bench.count
        result[f"{size}_kilobytes"] = sum(sizes) / bench.count / 1e3
    if bench.sheet:
        _draw_sheet(bench, _materials(bench, bench.sizes[0]))
    return measure.report(bench, result)


def _materials(bench: SyntheticBench, size: int) -> Materials:
    given = Synthetic(
        count=bench.count, fonts=bench.fonts or _packaged_fonts(), texts=bench.texts, backgrounds=bench.backgrounds,
        locales=bench.locales, style=bench.style, size=size, seed=bench.seed,
    )  # fmt: skip
    # The engine's config has sources, of which nothing is read here.
    sources = (Source("none", "folder", "."),)
    return load_materials(EngineConfig(sources=sources, synthetic=given, encoding=bench.encoding))


def _packaged_fonts() -> tuple[str, ...]:
    try:
        return tuple(importlib.import_module(module).font_files[name] for module, name in FONTS.values())
    except ImportError as error:
        raise LensError(f'{error}: name --fonts, or: pip install "lens-jax[demo]"') from None


_COLUMNS, _ROWS, _SIDE, _GAP = 6, 4, 220, 6


def _draw_sheet(bench: SyntheticBench, materials: Materials) -> None:
    from PIL import Image

    step = _SIDE + _GAP
    sheet = Image.new("RGB", (_COLUMNS * step + _GAP, _ROWS * step + _GAP), "white")
    for index in range(_COLUMNS * _ROWS):
        record = synthesize(bench.seed, index, materials)
        print(f"{index:2} {record.captions['en'][0]}")
        with Image.open(io.BytesIO(record.image)) as image:
            image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            row, column = divmod(index, _COLUMNS)
            left, top = _GAP + column * step, _GAP + row * step
            sheet.paste(image, (left + (_SIDE - image.width) // 2, top + (_SIDE - image.height) // 2))
    try:
        Path(bench.sheet).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(bench.sheet, quality=75)
    except (OSError, ValueError) as error:
        raise LensError(f"{bench.sheet}: cannot be written: {error}") from None
