"""The autoencoder against diffusers' AutoencoderKLFlux2: random weights, both ways, and its names."""

import functools

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
import torch
from diffusers import AutoencoderKLFlux2
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

from lens_jax.convert import autoencoder as convert
from lens_jax.models import autoencoder
from lens_jax.models.autoencoder import AutoencoderConfig
from lens_jax.models.latent_grid import latent_grid

pytestmark = pytest.mark.oracle

CONFIGS = {
    # Three levels, one residual block a level, other groups and channels than the goldens.
    "shallow": AutoencoderConfig(widths=(24, 48, 72), layers=1, cell_channels=12, groups=12, dtype="float32"),
    "released": AutoencoderConfig(dtype="float32"),
}
# Neither is square; the sides in cells are 12 x 20 and 6 x 14, and 6 x 10 and 3 x 7 tokens: odd ones too.
SIZES = [(96, 160), (48, 112)]


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def theirs(config: AutoencoderConfig) -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2.from_config(convert.config_to_release(config))


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """Config, diffusers' model with random weights of which none is trivial, and our parameters of the same."""
    config = CONFIGS[request.param]
    torch.manual_seed(0)
    model = theirs(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start at one and zero; matrices are random already
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.bn.running_mean.normal_(std=0.1)
        # At a variance of 0.01 an epsilon of 1e-5 instead of 1e-4 would be wrong by 0.4 %.
        model.bn.running_var.copy_(torch.logspace(-2, 1, len(model.bn.running_var)))
        model.bn.num_batches_tracked.fill_(7)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return config, model, convert.from_release(config, tensors, "diffusers")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_encode(pair, size):
    config, model, params = pair
    images = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).latent_dist
        # The batch norm itself normalises the patches.
        expected = Flux2Pipeline._pack_latents(model.bn(Flux2Pipeline._patchify_latents(posterior.mean)))
    mean, log_variance = jax.jit(functools.partial(autoencoder.posterior, config))(params, images)
    assert relative_error(mean, posterior.mean.permute(0, 2, 3, 1)) <= 2e-5
    assert relative_error(log_variance, posterior.logvar.permute(0, 2, 3, 1)) <= 2e-5
    actual = jax.jit(functools.partial(autoencoder.encode, config))(params, images)
    assert relative_error(actual, expected) <= 2e-5


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_decode(pair, size):
    config, model, params = pair
    grid = latent_grid(config, *size)
    latents = np.random.default_rng(1).standard_normal((2, grid[0] * grid[1], config.latent_channels), np.float32)
    with torch.no_grad():
        packed = torch.from_numpy(latents).transpose(1, 2).unflatten(2, grid)
        bn = model.bn
        packed = packed * (bn.running_var + bn.eps).sqrt()[:, None, None] + bn.running_mean[:, None, None]
        expected = model.decode(Flux2Pipeline._unpatchify_latents(packed)).sample
    actual = jax.jit(functools.partial(autoencoder.decode, config, grid=grid))(params, latents)
    assert relative_error(actual, expected.permute(0, 2, 3, 1)) <= 2e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes(name):
    """The table is diffusers' state dict."""
    config = CONFIGS[name]
    with torch.device("meta"):
        state = theirs(config).state_dict()
    rules = {rule.name: rule.shape for rule in convert.rules(config)}
    assert rules == {name: tuple(tensor.shape) for name, tensor in state.items()}
    if name == "released":
        assert len(rules) == 251
