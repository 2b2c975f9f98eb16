"""Shared by all tests: eight simulated CPU devices would slow single-device tests, so one device is the default."""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")


@pytest.fixture(scope="session")
def goldens() -> Path:
    return Path(__file__).parent / "goldens"
