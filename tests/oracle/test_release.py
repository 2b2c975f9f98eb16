"""Whole releases of random sizes with random weights, from token ids to bytes, in float32."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")
import jax
import torch
from diffusers import AutoencoderKLFlux2

from lens_jax.bench.distance import relative_distance
from lens_jax.convert import autoencoder, denoiser, gpt_oss, writer
from lens_jax.models import gpt_oss as text_model
from lens_jax.models.autoencoder import AutoencoderConfig
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.gpt_oss import GptOssConfig

_spec = importlib.util.spec_from_file_location("original", Path(__file__).with_name("original.py"))
original = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(original)

pytestmark = pytest.mark.oracle

DROP = 5


def random_sizes(rng: np.random.Generator):
    """Configs of the three networks that fit each other, and the layers of the text encoder that are read."""
    text = GptOssConfig(
        layers=int(rng.integers(3, 7)), width=32 * int(rng.integers(2, 4)), hidden=32 * int(rng.integers(2, 5)),
        heads=4, kv_heads=int(rng.choice([1, 2, 4])), head_dim=2 * int(rng.integers(6, 13)),
        experts=int(rng.integers(3, 8)), experts_per_token=2, vocab=300, window=int(rng.integers(3, 9)),
        dtype="float32", param_dtype="float32",
    )  # fmt: skip
    taps = tuple(sorted(rng.choice(text.layers, int(rng.integers(1, 4)), replace=False).tolist()))
    axes = tuple(2 * int(n) for n in rng.integers(2, 9, 3))
    network = DenoiserConfig(
        layers=int(rng.integers(2, 7)), heads=int(rng.integers(2, 5)), head_dim=sum(axes), rope_axes=axes,
        latent_channels=128, text_width=text.width, text_layers=len(taps), dtype="float32",
    )  # fmt: skip
    groups = int(rng.choice([4, 8]))
    codec = AutoencoderConfig(widths=tuple(groups * int(n) for n in rng.integers(1, 5, 4)), groups=groups)
    return text, taps, network, codec


def write_release(folder, goldens, rng):
    """A release folder of random sizes in which no parameter is trivial; returns its text encoder's config."""
    text, taps, network, codec = random_sizes(rng)
    for name in ("model_index.json", "scheduler"):
        place = goldens / "tiny_release" / name
        (shutil.copytree if place.is_dir() else shutil.copy)(place, folder / name)
    config = lambda name, values: (folder / name / "config.json").write_text(json.dumps(values))

    tensors = {}
    for rule in denoiser.rules(network):
        noise = rng.standard_normal(rule.shape, np.float32)
        is_norm = "norm" in rule.name and len(rule.shape) == 1 and "linear" not in rule.name
        tensors[rule.name] = 1 + np.float32(0.2) * noise if is_norm else noise / np.float32(np.sqrt(rule.shape[-1]))
    writer.write_folder(folder / "transformer", tensors, stem="diffusion_pytorch_model")
    config("transformer", denoiser.config_to_release(network, taps))

    params = text_model.init(text, jax.random.key(int(rng.integers(1 << 30))))
    grown = lambda path, x: x + 3 if path[-1].key == "scales" else x if path[-1].key in ("blocks", "scale") else 10 * x
    params = jax.tree_util.tree_map_with_path(grown, params)
    writer.write_folder(folder / "text_encoder", gpt_oss.to_release(text, params), stem="model")
    config("text_encoder", gpt_oss.config_to_release(text) | {"pad_token_id": 0, "eos_token_id": 2})

    torch.manual_seed(int(rng.integers(1 << 30)))
    vae = AutoencoderKLFlux2.from_config(autoencoder.config_to_release(codec))
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        vae.bn.running_mean.normal_(std=0.1)
        vae.bn.running_var.copy_(torch.logspace(-2, 1, len(vae.bn.running_var)))
    vae.save_pretrained(folder / "vae")
    return text, network


@pytest.mark.parametrize("seed", range(3))
def test_from_tokens_to_bytes(goldens, tmp_path, seed):
    rng = np.random.default_rng(seed)
    text, network = write_release(tmp_path, goldens, rng)
    lengths = np.array([DROP + 11, DROP + 3])
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int32)
    ids = np.where(mask, rng.integers(3, text.vocab, mask.shape), 0).astype(np.int32)
    grid = tuple(int(n) for n in rng.integers(3, 9, 2))
    noise = rng.standard_normal((2, grid[0] * grid[1], network.latent_channels), np.float32)
    for steps in (4, 20):
        request = original.Request(ids, mask, DROP, noise, grid, steps, guidance_scale=float(rng.uniform(1.5, 5)))
        theirs, ours = original.draw_as_the_release(tmp_path, request), original.draw_as_we_do(tmp_path, request)
        distances = {key: relative_distance(ours[key], theirs[key]) for key in ("text", "latents")}
        off = np.abs(ours["images"].astype(int) - theirs["images"])
        print(f"seed {seed}, {steps} steps: {distances}, bytes off {(off > 0).mean():.1e}, by {off.max()}")
        # A right float32 implementation sums in another order: 1.1e-6 to 3.6e-6 of the text's features, which are
        # normed where they are read, and 2.6e-7 to 1.4e-6 of the latents.
        assert distances["text"] <= 1e-5
        assert distances["latents"] <= 4e-6
        assert off.max() <= 1
        assert (off > 0).mean() <= 1e-3
