"""Fonts that packages carry: Latin ones, and those of two scripts that must be shaped."""

import importlib
from pathlib import Path

import pytest

from lens_jax.data.lettering import FONTS


def packaged(module: str, ending: str) -> str:
    folder = Path(importlib.import_module(module).__file__).parent
    return str(next(path for path in sorted(folder.rglob("*.ttf")) if path.name.endswith(ending)))


@pytest.fixture(scope="session")
def latin() -> tuple[str, ...]:
    return tuple(importlib.import_module(module).font_files[name] for module, name in FONTS.values())


@pytest.fixture(scope="session")
def amiri() -> str:
    return packaged("fontpkg_amiri", "Amiri-Regular.ttf")


@pytest.fixture(scope="session")
def devanagari() -> str:
    return packaged("fontpkg_noto_sans_devanagari", ".ttf")


@pytest.fixture(scope="session")
def dejavu() -> str:
    return packaged("matplotlib", "DejaVuSans.ttf")
