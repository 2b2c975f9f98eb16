"""The denoiser against an eager PyTorch one written apart from it: outputs, gradients, names."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from lens_jax.bench.torch_denoiser import TorchDenoiser, load_release
from lens_jax.convert import denoiser as convert
from lens_jax.convert.folder import open_component
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.errors import LensError
from lens_jax.models import denoiser
from lens_jax.models.denoiser import LENS, DenoiserConfig
from lens_jax.models.layers import joint_positions

pytestmark = pytest.mark.oracle

# Deeper and with other proportions than the goldens.
MID = DenoiserConfig(
    layers=5, heads=5, head_dim=48, mlp_width=336, latent_channels=20, text_width=72, text_layers=3,
    rope_axes=(8, 16, 24), dtype="float32",
)  # fmt: skip
GRID = (7, 10)


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


@pytest.fixture(scope="module")
def mid():
    """Random weights, all non-trivial, by the names of the release; and inputs: rows with all, some and no text."""
    rng = np.random.default_rng(0)
    tensors = {}
    for rule in convert.rules(MID):
        noise = rng.standard_normal(rule.shape, np.float32)
        if "norm" in rule.name and len(rule.shape) == 1 and "linear" not in rule.name:
            tensors[rule.name] = 1 + np.float32(0.2) * noise
        else:
            tensors[rule.name] = noise / np.float32(np.sqrt(rule.shape[-1]))
    # Text layers of very different magnitude, as GPT-OSS gives them.
    text = tuple(np.float32(10**i) * rng.standard_normal((3, 11, MID.text_width), np.float32) for i in range(3))
    inputs = {
        "latents": rng.standard_normal((3, 70, MID.latent_channels), np.float32),
        "text": text,
        "lengths": np.array([11, 4, 0], np.int32),
        "t": np.array([0.02, 0.6, 1.0], np.float32),
    }
    return tensors, inputs


def run_torch(model, inputs, grid):
    lengths, text_tokens = inputs["lengths"], inputs["text"][0].shape[1]
    mask = torch.from_numpy(np.arange(text_tokens) < lengths[:, None])
    text = [torch.from_numpy(np.array(layer)) for layer in inputs["text"]]
    return model(torch.from_numpy(np.array(inputs["latents"])), text, torch.from_numpy(inputs["t"]), grid, mask)


def run_ours(config, params, inputs, grid):
    positions = joint_positions(*grid, inputs["text"][0].shape[1])
    return denoiser.apply(config, params, inputs["latents"], inputs["text"], inputs["lengths"], inputs["t"], positions)


@pytest.mark.parametrize("name", ["tiny_square", "tiny_landscape"])
def test_the_reference_matches_the_release(goldens, name):
    folder = goldens / name
    config = convert.read_config(folder / "config.json", dtype="float32")
    tensors = SafetensorsFile(folder / "diffusion_pytorch_model.safetensors")
    io = SafetensorsFile(folder / "io.safetensors")
    inputs = {
        "latents": io["hidden_states"],
        "text": [io[f"encoder_hidden_states.{i}"] for i in range(config.text_layers)],
        "lengths": io["mask"].sum(1),
        "t": np.array(io["timestep"]),
    }
    with torch.no_grad():
        actual = run_torch(load_release(TorchDenoiser(config), tensors), inputs, tuple(int(n) for n in io["hw"]))
    # The same operations in the same library: only their order inside fused kernels differs.
    assert relative_error(actual, io["output"]) <= 5e-6


def test_outputs_agree(mid):
    tensors, inputs = mid
    with torch.no_grad():
        expected = run_torch(load_release(TorchDenoiser(MID), tensors), inputs, GRID)
    params = convert.from_release(MID, tensors, "random")
    actual = jax.jit(functools.partial(run_ours, MID, grid=GRID))(params, inputs)
    assert relative_error(actual, expected) <= 5e-6


def test_gradients_agree(mid):
    """Every parameter's gradient of the mean square, in the names of the release: the table maps gradients too."""
    tensors, inputs = mid
    model = load_release(TorchDenoiser(MID), tensors)
    run_torch(model, inputs, GRID).square().mean().backward()
    loss = lambda params: jnp.mean(run_ours(MID, params, inputs, GRID) ** 2)
    ours = convert.to_release(MID, jax.jit(jax.grad(loss))(convert.from_release(MID, tensors, "random")))
    errors, unused = {}, set()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            unused.add(name)
            assert not ours[name].any(), name
        else:
            errors[name] = relative_error(ours[name], parameter.grad)
    # What the last block does to the text is read by nobody.
    last = "transformer_blocks.4"
    assert unused == {f"{last}.attn.to_add_out.{part}" for part in ("weight", "bias")} | {
        f"{last}.{part}.weight" for part in ("txt_norm2", "txt_mlp.w1", "txt_mlp.w2", "txt_mlp.w3")
    }
    # The text's queries in the last block are not unused but zero: their outputs are cut off behind the softmax.
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 1e-5, worst


def test_released_names_and_shapes(goldens):
    with torch.device("meta"):
        state = TorchDenoiser(LENS).state_dict()
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert theirs == {rule.name: rule.shape for rule in convert.rules(LENS)}
    lines = (goldens / "release_tensors.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line.startswith("transformer\t")]
    assert theirs == {name: tuple(json.loads(shape)) for _, name, _, shape in rows}


def test_bad_input_says_what_would_do(goldens, mid):
    tensors, inputs = mid
    model = TorchDenoiser(MID)
    with pytest.raises(LensError, match=r"accepted: \[B, 63, 20\] for a grid of 7 x 9"):
        run_torch(model, inputs, (7, 9))
    with pytest.raises(LensError, match=r"accepted: 3 of \[3, T, 72\]"):
        run_torch(model, {**inputs, "text": inputs["text"][:2]}, GRID)
    with pytest.raises(LensError, match=r"missing .*img_in.weight"):
        load_release(model, {name: tensors[name] for name in tensors if name != "img_in.weight"})
    with pytest.raises(LensError, match="missing"):
        load_release(model, open_component(goldens / "tiny_release" / "transformer"))
