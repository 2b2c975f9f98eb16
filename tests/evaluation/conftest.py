import pytest

from lens_jax.data import scenes
from lens_jax.data.sources import openmoji
from lens_jax.evaluation.scene_references import load_references


@pytest.fixture(scope="session")
def concepts():
    return openmoji.load_concepts(128)


@pytest.fixture(scope="session")
def references():
    return load_references()


@pytest.fixture(scope="session")
def sprite(references):
    return scenes.sprite_cache(references.masters)
