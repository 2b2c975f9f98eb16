"""The denoiser against the released model's own forward pass, and properties that must hold at any size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.convert import denoiser as convert_denoiser
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.errors import LensError
from lens_jax.models import denoiser, layers
from lens_jax.models.denoiser import LENS, LENS_TOY, DenoiserConfig

TINY = DenoiserConfig(
    layers=2, heads=2, head_dim=16, latent_channels=8, text_width=12, text_layers=2, rope_axes=(4, 6, 6),
    dtype="float32",
)  # fmt: skip


def relative_error(actual, expected) -> float:
    return float(np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected))


def load_golden(folder, **options):
    """Config, parameters and inputs of a golden; the file holds the released model's own answer."""
    config = convert_denoiser.read_config(folder / "config.json", dtype="float32", **options)
    tensors = SafetensorsFile(folder / "diffusion_pytorch_model.safetensors")
    params = convert_denoiser.from_release(config, tensors, str(folder))
    io = SafetensorsFile(folder / "io.safetensors")
    height, width = io["hw"]
    text = tuple(io[f"encoder_hidden_states.{i}"] for i in range(config.text_layers))
    positions = layers.joint_positions(int(height), int(width), text[0].shape[1])
    inputs = (io["hidden_states"], text, io["mask"].sum(1).astype(np.int32), io["timestep"], positions)
    return config, params, inputs, io["output"]


@pytest.fixture(scope="module")
def random_params():
    """Every leaf non-trivial: the zero-initialised ways out would hide every error behind them."""
    leaves, tree = jax.tree.flatten(denoiser.init(TINY, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([0.5 * jax.random.normal(k, x.shape) + 0.1 for k, x in zip(keys, leaves)])


def tiny_inputs(batch=3, text_tokens=5):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((batch, 12, 8), np.float32)
    text = tuple(rng.standard_normal((batch, text_tokens, 12), np.float32) for _ in range(2))
    t = np.linspace(0.1, 0.9, batch, dtype=np.float32)
    return latents, text, t


@pytest.mark.parametrize("name", ["tiny_square", "tiny_landscape"])
@pytest.mark.parametrize("unroll", [False, True], ids=["scan", "unroll"])
def test_matches_release(goldens, name, unroll):
    config, params, inputs, expected = load_golden(goldens / name, unroll=unroll)
    actual = jax.jit(functools.partial(denoiser.apply, config))(params, *inputs)
    # A right float32 implementation differs from PyTorch by about 1e-6: another order of summation.
    assert relative_error(actual, expected) <= 5e-6


def test_release_size():
    assert denoiser.parameter_count(LENS) == 4_104_225_152
    assert len(convert_denoiser.rules(LENS)) == 1264
    assert 1.1e9 < denoiser.parameter_count(LENS_TOY) < 1.3e9


def test_empty_text_is_no_text(random_params):
    """Length zero must equal a run that never had text tokens, whatever the padding holds."""
    latents, text, t = tiny_inputs()
    nothing = np.zeros(3, np.int32)
    padded = denoiser.apply(TINY, random_params, latents, text, nothing, t, layers.joint_positions(3, 4, 5))
    bare = tuple(layer[:, :0] for layer in text)
    without = denoiser.apply(TINY, random_params, latents, bare, nothing, t, layers.joint_positions(3, 4, 0))
    assert relative_error(padded, without) < 1e-5


def test_padding_and_batch_do_not_matter(random_params):
    """A row alone and unpadded equals the same row in a batch padded to another length."""
    latents, text, t = tiny_inputs()
    lengths = np.array([5, 2, 0], np.int32)
    batch = denoiser.apply(TINY, random_params, latents, text, lengths, t, layers.joint_positions(3, 4, 5))
    alone = denoiser.apply(
        TINY,
        random_params,
        latents[1:2],
        tuple(layer[1:2, :2] for layer in text),
        lengths[1:2],
        t[1:2],
        layers.joint_positions(3, 4, 2),
    )
    assert relative_error(alone[0], batch[1]) < 1e-5


@pytest.mark.parametrize("remat", ["linear", *(pytest.param(how, marks=pytest.mark.slow) for how in ("full", "mlp"))])
def test_remat_changes_no_gradient(random_params, remat):
    latents, text, t = tiny_inputs()
    lengths = np.array([5, 2, 0], np.int32)
    positions = layers.joint_positions(3, 4, 5)

    def gradients(config):
        loss = lambda p: jnp.mean(denoiser.apply(config, p, latents, text, lengths, t, positions) ** 2)
        return jax.jit(jax.grad(loss))(random_params)

    expected = gradients(TINY)
    actual = gradients(dataclasses.replace(TINY, remat=remat))
    for path, leaf in jax.tree_util.tree_leaves_with_path(actual):
        other = functools.reduce(lambda tree, key: tree[key.key], path, expected)
        np.testing.assert_allclose(leaf, other, rtol=2e-4, atol=1e-5 * float(jnp.abs(other).max()))


def test_bfloat16_compute_keeps_float32_parameters(random_params):
    latents, text, t = tiny_inputs()
    lengths, positions = np.array([5, 2, 0], np.int32), layers.joint_positions(3, 4, 5)
    exact = denoiser.apply(TINY, random_params, latents, text, lengths, t, positions)
    config = dataclasses.replace(TINY, dtype="bfloat16")
    half = denoiser.apply(config, random_params, latents, text, lengths, t, positions)
    assert half.dtype == jnp.float32
    # bfloat16 keeps 8 bits of mantissa: 0.4 % a rounding, a few of them in a row.
    assert 1e-4 < relative_error(half, exact) < 5e-2
    assert jax.tree.leaves(denoiser.abstract_params(config))[0].dtype == jnp.float32


def test_positions_are_centred():
    even, odd = layers.joint_positions(64, 64, 2), layers.joint_positions(65, 64, 0)
    assert even[0].tolist() == [0, -32, -32]
    assert even[4095].tolist() == [0, 31, 31]
    assert odd[0].tolist() == [0, -33, -32]
    # Text starts where the grid ends and does not stretch: start + i on all three axes.
    assert even[4096:].tolist() == [[32] * 3, [33] * 3]
    starts = {(92, 46): 46, (86, 48): 43, (78, 52): 39, (130, 65): 65, (121, 68): 60, (101, 76): 50}
    for (height, width), start in starts.items():
        assert layers.joint_positions(height, width, 1)[-1].tolist() == [start] * 3


def test_bad_config_says_what_would_do():
    with pytest.raises(LensError, match=r"rope_axes .* add up to model.head_dim 64"):
        DenoiserConfig(rope_axes=(8, 28, 26))
    with pytest.raises(LensError, match="accepted: float32, bfloat16"):
        DenoiserConfig(dtype="float8")
