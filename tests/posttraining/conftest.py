"""A denoiser that was never trained, as a run to start from, and a run of reinforcement learning on it."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from lens_jax import config as config_files
from lens_jax.encoders.linear import LinearCodecConfig
from lens_jax.encoders.sentence import SentenceEncoderConfig
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.lora import LoraConfig
from lens_jax.posttraining import distill_recipe, rl_recipe
from lens_jax.posttraining.prompts.prompt import Prompt, write_prompts
from lens_jax.posttraining.rewards.combine import Judging, RewardsConfig, Weighted
from lens_jax.posttraining.rewards.function import Function
from lens_jax.posttraining.rl_config import EvaluationConfig, RlConfig, RolloutConfig
from lens_jax.posttraining.rl_job import Rl, prompts_of
from lens_jax.pretraining.config import SheetConfig, TrainConfig
from lens_jax.pretraining.recipe import create_state
from lens_jax.run import loop, store
from lens_jax.run.config import CheckpointConfig
from lens_jax.run.log import Log
from lens_jax.run.optimizer import OptimizerConfig
from lens_jax.run.signals import StopSignals
from lens_jax.run.state import to_parts

MODEL = DenoiserConfig(
    layers=2, heads=2, head_dim=16, rope_axes=(4, 6, 6), latent_channels=12, text_width=512, text_layers=1,
    dtype="float32",
)  # fmt: skip
PROMPTS = [Prompt(f"p/{i}", text, category="odd" if i % 2 else "even") for i, text in enumerate(
    ("red apple", "a cat", "two rockets", "an octopus", "a banana, a house")
)]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def programs_made_once():
    """Runs of one config share their programs, wherever their folders are: to trace them is most of so short a run."""
    patch = pytest.MonkeyPatch()
    for recipe, name in ((distill_recipe, "make_programs"), (rl_recipe, "make_programs"), (rl_recipe, "make_follow")):
        made = functools.cache(getattr(recipe, name))
        patch.setattr(recipe, name, lambda config, made=made: made(dataclasses.replace(config, out="")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A run whose parameters are random, away from the zeros that a new model has."""
    out = tmp_path_factory.mktemp("base") / "run"
    config = TrainConfig(
        out=str(out),
        model=MODEL,
        codec=LinearCodecConfig(patch=2, components=12),
        text=SentenceEncoderConfig(max_tokens=2),
    )

    @jax.jit
    def make():
        codec = {"basis": np.eye(12, dtype=np.float32), "mean": np.zeros(12, np.float32), "scale": np.float32([0.5])}
        state = create_state(config, codec)
        leaves, tree = jax.tree.flatten(state.params)
        keys = jax.random.split(jax.random.key(7), len(leaves))
        moved = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)]
        params = jax.tree.unflatten(tree, moved)
        return state.replace(params=params, ema=params)

    checkpoints = store.Store(store.folder_of(config.out, config.checkpoint), config.checkpoint)
    meta = {"kind": "pretraining", "config": config_files.to_dict(config), "sizes": [[8, 8]], "position": {}}
    checkpoints.save(1, to_parts(make()), meta)
    checkpoints.close()
    return out


@pytest.fixture(scope="session")
def rl_config(base, tmp_path_factory) -> RlConfig:
    """Three epochs of two groups of four images of two sizes; replace `out` in it."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_prompts(prompts, PROMPTS)
    return RlConfig(
        init_from=str(base),
        prompts=str(prompts),
        steps=3,
        lora=LoraConfig(rank=2, alpha=4, targets=("attention", "mlp")),
        rollout=RolloutConfig(groups=2, images=4, sizes=("8x8", "8x12"), batch_size=4, num_inference_steps=3),
        rewards=RewardsConfig(train=(Weighted(Function("nowhere:red", "red")),)),
        evaluation=EvaluationConfig(every=3, images=2, num_inference_steps=2),
        samples=SheetConfig(every=3, num_inference_steps=2),
        model=MODEL,
        codec=LinearCodecConfig(patch=2, components=12),
        text=SentenceEncoderConfig(max_tokens=2),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=1e-4),
        checkpoint=CheckpointConfig(every=1, keep=2),
    )


@pytest.fixture(scope="session")
def run_rl():
    """(config, reward) -> what `run.loop` ends with; with the set that it trains on held out too."""

    def run(config: RlConfig, reward, evaluation=()):
        prompts = prompts_of(config)
        judging = Judging([(reward, 1.0)], list(evaluation), config.rewards.max_failed, 2)
        log = Log(config.out, config.steps, config.logging, config.profile, Console(quiet=True))
        job = Rl(config, None, log, prompts, prompts[:2], judging)
        checkpoints = store.Store(store.folder_of(config.out, config.checkpoint), config.checkpoint)
        try:
            with StopSignals() as signals:
                return loop.run(job, checkpoints, log, signals)
        finally:
            judging.close()

    return run
