"""The autoencoder against the released model's own answers, and properties that must hold at any size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.convert import autoencoder as convert_autoencoder
from lens_jax.convert.folder import open_component
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.encoders import flux
from lens_jax.encoders.images import to_uint8
from lens_jax.encoders.linear import LinearCodecConfig
from lens_jax.errors import LensError
from lens_jax.models import autoencoder, tiled_decoder
from lens_jax.models.autoencoder import AutoencoderConfig
from lens_jax.models.latent_grid import latent_grid

GRID = (4, 6)


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def release(goldens):
    """Config, parameters and answers of the small release."""
    folder = goldens / "tiny_release"
    config = convert_autoencoder.read_config(folder / "vae" / "config.json", dtype="float32")
    params = convert_autoencoder.from_release(config, open_component(folder / "vae"), "vae")
    return config, params, SafetensorsFile(folder / "golden_io.safetensors")


@pytest.fixture(scope="module")
def decoded(release):
    config, params, answers = release
    return jax.jit(functools.partial(autoencoder.decode, config, grid=GRID))(params, answers["final_latents"])


def test_decode_matches_release(release, decoded):
    _, _, answers = release
    # A right float32 implementation differs by 1e-5: another order of summation.
    assert relative_error(decoded, answers["image"].transpose(0, 2, 3, 1)) <= 1e-5
    off = np.abs(np.asarray(to_uint8(decoded)).astype(int) - answers["image_uint8"])
    assert off.max() <= 1
    assert (off != 0).mean() <= 1e-3


def test_encode_matches_release(release):
    config, params, answers = release
    both = lambda p, x: (autoencoder.posterior(config, p, x)[0], autoencoder.encode(config, p, x))
    mean, latents = jax.jit(both)(params, answers["pixels"].transpose(0, 2, 3, 1))
    assert relative_error(mean, answers["posterior_mean"].transpose(0, 2, 3, 1)) <= 2e-5
    assert relative_error(latents, answers["normalized_latents"]) <= 2e-5


def test_a_sample_is_spread_as_the_posterior_says(release, monkeypatch):
    config, params, answers = release
    mean = answers["posterior_mean"].transpose(0, 2, 3, 1)
    log_variance = np.broadcast_to(np.linspace(-4, 1, 32, dtype=np.float32), mean.shape)
    monkeypatch.setattr(autoencoder, "posterior", lambda *_: (mean, log_variance))
    images = jnp.zeros((2, 64, 96, 3))
    noise = lambda seed: jax.random.normal(jax.random.key(seed), (2, 24, 128))
    sample = lambda seed: np.asarray(autoencoder.encode(config, params, images, noise(seed)))
    assert np.array_equal(sample(0), sample(0))
    draws = np.stack([sample(seed) for seed in range(24)])
    expected = np.repeat(np.exp(log_variance[0, 0, 0]), 4) / (params["latent_statistics"]["variance"] + 1e-4)
    # 24 draws of 2 x 24 tokens: the variance of a channel is known to about 4 %.
    np.testing.assert_allclose(draws.var(0, ddof=1).mean((0, 1)), expected, rtol=0.25)
    np.testing.assert_allclose(draws.mean(0), answers["normalized_latents"], atol=6 * (expected.max() / 24) ** 0.5)


def test_released_size():
    config = AutoencoderConfig()
    assert autoencoder.parameter_count(config) == 84_046_115
    assert (config.latent_channels, config.tile) == (128, 16)
    leaf = autoencoder.abstract_params(config)["decoder"]["levels"]["2"]["resnets"]["0"]["shortcut"]["kernel"]
    assert leaf.shape == (1, 1, 512, 256)


def test_both_codecs_have_one_contract():
    config, pixels = AutoencoderConfig(), LinearCodecConfig(patch=16, components=768)
    assert latent_grid(config, 1024, 768) == latent_grid(pixels, 1024, 768) == (64, 48)
    for size in ((1000, 1024), (0, 16), (1024, 1032)):
        with pytest.raises(LensError, match="positive multiples of 16"):
            latent_grid(config, *size)
    with pytest.raises(LensError, match="positive multiples of 16"):
        autoencoder.encode(config, {}, jnp.zeros((1, 40, 32, 3)))


def test_latents_are_normalised_when_packed_and_with_their_own_epsilon(monkeypatch):
    """Channel 4c + 2p + q of a token is channel c of its cell (p, q), and its statistics are those of 4c + 2p + q."""
    config = AutoencoderConfig()
    cells = np.arange(1 * 4 * 2 * 32, dtype=np.float32).reshape(1, 4, 2, 32)
    monkeypatch.setattr(autoencoder, "posterior", lambda *_: (cells, np.zeros_like(cells)))
    mean, variance = np.arange(128, dtype=np.float32), np.linspace(1e-5, 1, 128, dtype=np.float32)
    params = {"latent_statistics": {"mean": mean, "variance": variance}}
    latents = np.asarray(autoencoder.encode(config, params, jnp.zeros((1, 32, 16, 3))))
    for token, c, p, q in ((0, 0, 0, 0), (0, 5, 1, 0), (1, 31, 1, 1), (1, 3, 0, 1)):
        channel = 4 * c + 2 * p + q
        expected = (cells[0, 2 * token + p, q, c] - channel) / np.sqrt(variance[channel] + 1e-4)
        np.testing.assert_allclose(latents[0, token, channel], expected, rtol=1e-5)


def test_queries_in_parts_change_nothing(release, decoded, monkeypatch):
    config, params, answers = release
    images = len(answers["final_latents"])
    monkeypatch.setattr(autoencoder, "_SCORES", 36 * 96 * images)  # 36 of 96 queries: two whole parts and a rest
    decode = jax.jit(functools.partial(autoencoder.decode, config, grid=GRID))
    assert relative_error(decode(params, answers["final_latents"]), decoded) < 1e-6


@pytest.mark.parametrize("grid", [(7, 5), pytest.param((1, 3), marks=pytest.mark.slow)], ids=str)
def test_tiled_decoding_is_decoding(release, grid):
    """Norms over all strips, edges, many strips and one; several images."""
    config, params, _ = release
    latents = 3 * jax.random.normal(jax.random.key(0), (2, grid[0] * grid[1], 128))
    whole = jax.jit(functools.partial(autoencoder.decode, config, grid=grid))(params, latents)
    tiled = jax.jit(functools.partial(tiled_decoder.decode_tiled, config, grid=grid))(params, latents)
    assert tiled.dtype == whole.dtype
    # Statistics are summed in another order.
    assert relative_error(tiled, whole) <= 1e-5
    assert np.abs(np.asarray(to_uint8(tiled)).astype(int) - np.asarray(to_uint8(whole))).max() <= 1


@pytest.mark.slow
def test_tiled_decoding_is_no_further_from_float32_than_whole():
    """In bfloat16 the two differ, but by no more than whole decoding does from itself when one number is one digit off.

    Whatever little differs turns a few roundings, these turn more in the layers behind, and a few layers on all are
    drawn anew. So what counts is the distance from float32. `-s` shows the figures of docs/checkpoints.md.
    """
    config = AutoencoderConfig(widths=(8, 16, 32, 32), layers=1, cell_channels=8, groups=4)
    exact, grid = dataclasses.replace(config, dtype="float32"), (8, 12)
    program = lambda decode, config: jax.jit(functools.partial(decode, config, grid=grid))
    precise, whole = (program(autoencoder.decode, c) for c in (exact, config))
    tiled = program(tiled_decoder.decode_tiled, config)
    for seed in range(4):
        params = autoencoder.init(config, jax.random.key(seed))
        latents = jax.random.normal(jax.random.key(seed + 100), (1, grid[0] * grid[1], config.latent_channels))
        nudged = latents.at[0, 0, 0].multiply(1 + 2**-7)
        truth, image, parts = (decode(params, latents) for decode in (precise, whole, tiled))
        errors = relative_error(image, truth), relative_error(parts, truth)
        apart, moved = relative_error(parts, image), relative_error(whole(params, nudged), image)
        exactly = relative_error(precise(params, nudged), truth)
        print(
            f"seed {seed}: from float32 whole {errors[0]:.2%}, tiled {errors[1]:.2%}; from each other {apart:.2%}; one "
            f"digit of one number moves whole by {moved:.2%}, and by {exactly:.1e} in float32"
        )
        assert errors[1] <= 1.1 * errors[0]
        assert apart <= 1.2 * moved


@pytest.mark.slow
def test_tiled_decoding_needs_less_memory(monkeypatch):
    """By what XLA sets aside: one activation a layer. The middle block, whole in both, is kept small here."""
    config = AutoencoderConfig(widths=(16, 32, 32), layers=1, groups=8, cell_channels=4, patch=1, dtype="float32")
    monkeypatch.setattr(autoencoder, "_SCORES", 2**20)
    latents, grid = jax.ShapeDtypeStruct((1, 384 * 32, 4), jnp.float32), (384, 32)

    def needed(decode):
        program = jax.jit(functools.partial(decode, config, grid=grid))
        return program.lower(autoencoder.abstract_params(config), latents).compile().memory_analysis()

    tiled, whole = (needed(d).temp_size_in_bytes for d in (tiled_decoder.decode_tiled, autoencoder.decode))
    assert tiled < 0.6 * whole


@pytest.mark.slow
def test_what_is_decoded_in_parts(release, monkeypatch):
    """By area and the number of images, unless it is turned off; the result is the same."""
    config, params, answers = release
    codec, latents = flux.FluxCodecConfig(model=config), jnp.tile(answers["final_latents"], (2, 1, 1))
    calls = []
    for module, name in ((autoencoder, "decode"), (tiled_decoder, "decode_tiled")):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, run=run, n=name: calls.append((n, a[2].shape[0])) or run(*a))
    whole = codec.decode(params, latents, GRID)
    tokens = GRID[0] * GRID[1]
    for limit, tiling, call in (
        (3 * tokens, True, ("decode", 2)),
        (tokens - 1, True, ("decode_tiled", len(latents))),
        (tokens - 1, False, ("decode", len(latents))),
    ):
        calls.clear()
        monkeypatch.setattr(flux, "_LARGEST_WHOLE", limit)
        parts = dataclasses.replace(codec, tiling=tiling).decode(params, latents, GRID)
        assert calls == [call]
        assert relative_error(parts, whole) <= 1e-5


def test_bfloat16_compute_keeps_its_distance(release, decoded):
    config, params, answers = release
    half = dataclasses.replace(config, dtype="bfloat16")
    image = jax.jit(functools.partial(autoencoder.decode, half, grid=GRID))(params, answers["final_latents"])
    assert image.dtype == jnp.float32
    # bfloat16 keeps 8 bits of mantissa: 0.4 % a rounding, some forty of them in a row.
    assert 1e-4 < relative_error(image, decoded) < 5e-2


def test_fresh_parameters_have_the_announced_shapes():
    config = AutoencoderConfig(widths=(4,), layers=1, cell_channels=2, groups=2, param_dtype="bfloat16")
    fresh = jax.jit(functools.partial(autoencoder.init, config))(jax.random.key(0))
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert kinds(fresh) == kinds(autoencoder.abstract_params(config))
    assert fresh["latent_statistics"]["variance"].dtype == jnp.float32
    kernel = np.asarray(fresh["encoder"]["conv_in"]["kernel"], np.float32)
    assert 0.8 / 27**0.5 < np.abs(kernel).max() <= 1.01 / 27**0.5


def test_shapes_and_dtypes_of_the_released_size():
    config = AutoencoderConfig()
    params, images = autoencoder.abstract_params(config), jax.ShapeDtypeStruct((2, 1024, 768, 3), jnp.bfloat16)
    latents = jax.eval_shape(functools.partial(autoencoder.encode, config), params, images)
    assert (latents.shape, latents.dtype) == ((2, 64 * 48, 128), jnp.bfloat16)
    back = jax.eval_shape(functools.partial(autoencoder.decode, config, grid=(64, 48)), params, latents)
    assert (back.shape, back.dtype) == (images.shape, images.dtype)
    large = jax.ShapeDtypeStruct((1, 128 * 130, 128), jnp.float32)
    tiled = jax.eval_shape(functools.partial(tiled_decoder.decode_tiled, config, grid=(128, 130)), params, large)
    assert tiled.shape == (1, 2048, 2080, 3)


def test_bad_config_says_what_would_do():
    with pytest.raises(LensError, match=r"widths \(100, 200\) must be positive multiples of autoencoder.groups 32"):
        AutoencoderConfig(widths=(100, 200))
    with pytest.raises(LensError, match="accepted: float32, bfloat16"):
        AutoencoderConfig(dtype="float8")
