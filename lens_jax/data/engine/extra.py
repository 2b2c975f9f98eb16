"""Packages of the extra `data`, imported where they are first used."""

import importlib
from types import ModuleType

from lens_jax.errors import LensError


def needed(module: str) -> ModuleType:
    """A module that may not be installed; LensError names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LensError(f"the data engine needs {module} ({error}): pip install 'lens-jax[data]'") from error
