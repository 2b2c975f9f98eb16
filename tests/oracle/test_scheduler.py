"""The schedule and the steps against diffusers' FlowMatchEulerDiscreteScheduler with the release's config."""

import json

import jax
import jax.numpy as jnp
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
    # Bit for bit, and so is the t that the network is asked about: the release divides its timesteps by 1000 again.
    np.testing.assert_array_equal(actual, scheduler.sigmas.numpy())
    level = jax.jit(jax.vmap(lambda s: sampler._level(jnp.zeros((1, 1, 1)), s)[0]))
    np.testing.assert_array_equal(level(actual[:-1]), (scheduler.timesteps / 1000).numpy())


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
