"""What CONTRIBUTING.md shows of adding something works as it stands there."""

# What the examples use, they find here.
# ruff: noqa: F401
import dataclasses
import functools
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lens_jax.data.buckets import Bucket
from lens_jax.data.images import encode_image
from lens_jax.data.index import load_index
from lens_jax.data.records import Record, encode
from lens_jax.data.writer import DataWriter
from lens_jax.encoders.sentence import SentenceEncoderConfig
from lens_jax.models import attention
from lens_jax.posttraining.prompts.prompt import Prompt
from lens_jax.posttraining.rewards.combine import Judging
from lens_jax.posttraining.rewards.function import FunctionReward
from lens_jax.pretraining import recipe
from lens_jax.pretraining.job import Pretraining
from lens_jax.pretraining.loss import training_loss
from lens_jax.run import loop, step
from lens_jax.run.log import Log
from lens_jax.run.optimizer import learning_rate_schedule, make_optimizer
from lens_jax.run.signals import StopSignals
from lens_jax.run.step import StepConfig
from lens_jax.run.store import Store, folder_of

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def example(tiny_config, tmp_path):
    """Runs the block that follows a word in bold; its names and those of the files it belongs into."""

    def run(title: str, **names):
        block = re.search(rf"\\*\\*{title}\\*\\*.*?```python\n(.*?)```", TEXT, re.DOTALL)[1]
        scope = {**globals(), "config": tiny_config, "run": SimpleNamespace(step=step), "folder": tmp_path, **names}
        exec(compile(block, "CONTRIBUTING.md", "exec"), scope)
        return scope

    return run


def batch(config) -> dict:
    rng = np.random.default_rng(0)
    return {
        "latents": rng.standard_normal((2, 4, 48), np.float32),
        "text": (rng.standard_normal((2, 3, 512), np.float32),),
        "text_lengths": np.array([3, 1], np.int32),
        "positions": np.zeros((7, 3), np.int32),
    }


def test_a_loss(example, tiny_config):
    parts = {"optimizer": make_optimizer(tiny_config.optimizer, 8)}
    scope = example("A loss", **parts, schedule=learning_rate_schedule(tiny_config.optimizer, 8))
    state = jax.jit(functools.partial(recipe.create_state, tiny_config))({})
    plain = training_loss(tiny_config.model, tiny_config.flow, state.params, {}, batch(tiny_config), state.key)[0]
    pulled = scope["pulled_to_zero"](state.params, {}, batch(tiny_config), state.key)[0]
    np.testing.assert_allclose(pulled - plain, 1e-4 * optax.tree.norm(state.params), rtol=1e-2)
    _, metrics = scope["programs"].train_step(state, batch(tiny_config))
    assert metrics["finite"]


def test_a_text_encoder(example):
    halved = example("A text encoder")["HalvedConfig"](max_tokens=2)
    (layer,) = halved.features((), np.ones((1, 2, 512)), None)
    assert layer.max() == 0.5
    assert (halved.width, halved.num_layers) == (512, 1)


def test_a_data_source(example, tmp_path):
    example("A data source")
    (record,) = load_index(tmp_path).records("train")
    assert record.captions == {"en": ("nothing",)}


def test_an_attention_kernel(example):
    rng = np.random.default_rng(0)
    image, text = (tuple(rng.standard_normal((2, n, 2, 8), np.float32) for _ in range(3)) for n in (6, 3))
    lengths = np.array([9, 6], np.int32)
    example("An attention kernel")
    try:
        ours = attention.attend(image, text, lengths, kernel="plain")
    finally:
        del attention._KERNELS["plain"]
    for one, other in zip(ours, attention.attend(image, text, lengths, kernel="xla")):
        np.testing.assert_allclose(one[:1], other[:1], atol=1e-5)
        np.testing.assert_allclose(one[1:, :3], other[1:, :3], atol=1e-5)


def test_a_reward(example):
    judging = Judging([(example("A reward")["Redness"]().load(), 1.0)], [], max_failed=0.0, at_once=1)
    images = [np.full((4, 4, 3), value, np.uint8) for value in (0, 255)]
    scores = judging.submit(images, [Prompt("a", "b")] * 2).result()
    judging.close()
    assert [score.values["reward"] for score in scores] == [0.0, 1.0]


def test_an_algorithm(example, tiny_config, tmp_path):
    quiet = dataclasses.replace(tiny_config.samples, every=0)
    once = dataclasses.replace(tiny_config, out=str(tmp_path / "run"), steps=1, samples=quiet)
    assert int(example("An algorithm", config=once)["outcome"].state.step) == 1
