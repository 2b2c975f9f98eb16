"""The denoiser's velocity for sizes, weights and noise levels at random: the figure of the README."""

import math

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from lens_jax.bench.torch_denoiser import TorchDenoiser, load_release
from lens_jax.convert import denoiser as convert
from lens_jax.models import denoiser, layers
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.layers import joint_positions

pytestmark = pytest.mark.oracle

LEVELS = 64


@pytest.mark.parametrize("seed", range(6))
def test_velocity_at_any_noise_level(seed, monkeypatch):
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
    arguments = (
        convert.from_release(config, tensors, "random"), latents, tuple(text), np.full(LEVELS, length, np.int32), t,
        joint_positions(*grid, length),
    )  # fmt: skip

    def errors() -> np.ndarray:
        # A function of its own each time, or JAX would take the program that it has.
        ours = jax.jit(lambda *a: denoiser.apply(config, *a))(*arguments)
        difference = (np.asarray(ours, np.float64) - expected.numpy()).reshape(LEVELS, -1)
        return np.linalg.norm(difference, axis=1) / np.linalg.norm(expected.numpy().reshape(LEVELS, -1), axis=1)

    found = errors()
    monkeypatch.setattr(layers, "timestep_frequencies", torch_frequencies)
    given = errors()
    ranges = (f"{e.min():.2g} to {e.max():.2g}" for e in (found, given))
    print("seed {}, {} layers: {}; with PyTorch's frequencies {}".format(seed, config.layers, *ranges))
    # Sums in another order, and two frequencies an ulp away.
    assert found.max() <= 4e-6
    # Sums in another order alone.
    assert given.max() <= 1.6e-6


def torch_frequencies(channels: int) -> np.ndarray:
    """As the original has them, by PyTorch's `exp` on this machine."""
    half = channels // 2
    return torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float32) / half).numpy()


def test_frequencies_differ_where_the_exact_one_lies_between():
    """By one unit in the last place at most, and in few: no formula's difference but a rounding of `exp`."""
    ours, theirs = layers.timestep_frequencies(256), torch_frequencies(256)
    units = np.abs(ours.view(np.int32) - theirs.view(np.int32))
    print(f"{np.flatnonzero(units)} of 128 differ")
    assert units.max() <= 1
    assert units.sum() <= 8  # 2 with MKL
