"""A checkpoint of format 3, kept as it was written: every later version reads it, to train on and to draw."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from lens_jax import LensPipeline
from lens_jax.errors import LensWarning
from lens_jax.pretraining.recipe import abstract_state, make_programs
from lens_jax.run.config import CheckpointConfig
from lens_jax.run.state import from_parts, to_parts
from lens_jax.run.store import Store

_spec = importlib.util.spec_from_file_location("golden_checkpoint", Path(__file__).with_name("golden_checkpoint.py"))
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


@pytest.fixture
def run(goldens, tmp_path) -> Path:
    return shutil.copytree(goldens / "checkpoint_3", tmp_path / "run")


def test_it_is_restored_to_train_on(run):
    abstract = abstract_state(golden.CONFIG, None, offload=False)
    parts, meta = Store(epath.Path(run) / "checkpoints", CheckpointConfig()).restore(to_parts(abstract))
    assert (meta["format"], meta["kind"], meta["sizes"]) == (3, "pretraining", [[8, 8]])
    state = from_parts(parts, abstract)
    assert int(state.step) == 2
    _, metrics = make_programs(golden.CONFIG).train_step(state, golden.batch(2))
    assert np.isfinite(metrics["loss"])


def test_it_draws_though_its_config_is_of_another_version(run):
    """Unknown fields are named, once and together; those of what is not needed to draw are not looked at."""
    with pytest.warns(LensWarning, match=r"ignored, since this version does not know it: model\.of_a_later_version$"):
        pipe = LensPipeline.from_pretrained(run)
    assert pipe.default_size == (8, 8)
    expected = np.array(json.loads((run / "drawn.json").read_text()))
    steps = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    found = pipe(prompt_embeds=golden.prompts(), latents=golden.noise(), **steps).images
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
