"""The schedule and the steps against diffusers' FlowMatchEulerDiscreteScheduler with the release's config."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from lens_jax.diffusion import sampler

pytestmark = pytest.mark.oracle

# Image tokens on both sides of 4300, where the shift is fitted otherwise, and the steps of the three variants.
CASES = [(tokens, steps) for tokens in (24, 1024, 4096, 4300, 4301, 8450) for steps in (1, 4, 20, 50)]


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.fixture
def scheduler(goldens):
    return FlowMatchEulerDiscreteScheduler.from_pretrained(goldens / "tiny_release" / "scheduler")


def test_the_config_is_the_release(goldens):
    values = json.loads((goldens / "tiny_release" / "scheduler" / "scheduler_config.json").read_text())
    assert values["use_dynamic_shifting"]
    assert (values["time_shift_type"], values["shift_terminal"]) == ("exponential", None)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sigmas(scheduler, case):
    steps = case[1]
    assert sampler.schedule_mu(*case) == pytest.approx(compute_empirical_mu(*case), rel=1e-12)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(*case))
    actual = sampler.sigma_schedule(*case)
    # float32 against float32: a step of it near 1 is 6e-8.
    np.testing.assert_allclose(actual, scheduler.sigmas.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(1000 * actual[:-1], scheduler.timesteps.numpy(), rtol=0, atol=1e-3)


def test_steps(scheduler):
    """The whole trajectory under a velocity that depends on the latents and on the time."""
    latents = np.random.default_rng(0).standard_normal((2, 12, 8), np.float32)
    sigmas = sampler.sigma_schedule(4096, 20)
    _, trajectory = sampler.euler(lambda x, t: 2 * x - t[:, None, None], latents, sigmas)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20), mu=compute_empirical_mu(4096, 20))
    x = torch.from_numpy(latents)
    for t, ours in zip(scheduler.timesteps, trajectory):
        x = scheduler.step(2 * x - t / 1000, t, x, return_dict=False)[0]
        assert relative_error(ours, x) <= 1e-6
