"""The denoiser's velocity for sizes, weights and noise levels at random: the figure of the README."""

import functools

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from lens_jax.bench.torch_denoiser import TorchDenoiser, load_release
from lens_jax.convert import denoiser as convert
from lens_jax.models import denoiser
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.layers import joint_positions

pytestmark = pytest.mark.oracle

LEVELS = 64


@pytest.mark.parametrize("seed", range(6))
def test_velocity_at_any_noise_level(seed):
    rng = np.random.default_rng(seed)
    axes = tuple(2 * int(n) for n in rng.integers(2, 12, 3))
    config = DenoiserConfig(
        layers=int(rng.integers(1, 13)), heads=int(rng.integers(1, 7)), head_dim=sum(axes), rope_axes=axes,
        latent_channels=4 * int(rng.integers(2, 33)), text_width=8 * int(rng.integers(2, 17)),
        text_layers=int(rng.integers(1, 5)), dtype="float32",
    )  # fmt: skip
    tensors = {}
    for rule in convert.rules(config):
        noise = rng.standard_normal(rule.shape, np.float32)
        is_norm = "norm" in rule.name and len(rule.shape) == 1 and "linear" not in rule.name
        tensors[rule.name] = 1 + np.float32(0.2) * noise if is_norm else noise / np.float32(np.sqrt(rule.shape[-1]))
    grid, length = tuple(int(n) for n in rng.integers(2, 6, 2)), int(rng.integers(1, 9))
    latents = rng.standard_normal((LEVELS, grid[0] * grid[1], config.latent_channels), np.float32)
    text = [rng.standard_normal((LEVELS, length, config.text_width), np.float32) for _ in range(config.text_layers)]
    t = np.concatenate([rng.uniform(0, 1, LEVELS - 2).astype(np.float32), np.float32([0, 1])])

    model = load_release(TorchDenoiser(config), tensors)
    with torch.no_grad():
        expected = model(torch.from_numpy(latents), list(map(torch.from_numpy, text)), torch.from_numpy(t), grid)
    ours = jax.jit(functools.partial(denoiser.apply, config))(
        convert.from_release(config, tensors, "random"), latents, tuple(text), np.full(LEVELS, length, np.int32), t,
        joint_positions(*grid, length),
    )  # fmt: skip
    difference = (np.asarray(ours, np.float64) - expected.numpy()).reshape(LEVELS, -1)
    errors = np.linalg.norm(difference, axis=1) / np.linalg.norm(expected.numpy().reshape(LEVELS, -1), axis=1)
    print(f"seed {seed}, {config.layers} layers: {errors.min():.2g} to {errors.max():.2g}")
    # Sums in another order; the angles of the time's sinusoids are the same bits.
    assert errors.max() <= 4e-6
