"""Adapters against PEFT in the PyTorch original's modules: ours loaded there, and theirs loaded here."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
import peft
import torch

from lens_jax.bench.torch_denoiser import TorchDenoiser, load_release
from lens_jax.convert import denoiser as convert
from lens_jax.convert import lora, lora_files
from lens_jax.models import denoiser
from lens_jax.models import lora as low_rank
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.layers import joint_positions
from lens_jax.models.lora import LoraConfig

pytestmark = pytest.mark.oracle

MODEL = DenoiserConfig(
    layers=2, heads=3, head_dim=16, latent_channels=8, text_width=24, text_layers=2, rope_axes=(4, 6, 6),
    dtype="float32",
)  # fmt: skip
GRID = (3, 5)


def relative_error(actual, expected) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def base():
    """(weights by the names of the release, inputs): rows with all, some and no text."""
    rng = np.random.default_rng(0)
    tensors = {}
    for rule in convert.rules(MODEL):
        noise = rng.standard_normal(rule.shape, np.float32)
        one = "norm" in rule.name and len(rule.shape) == 1 and "linear" not in rule.name
        tensors[rule.name] = 1 + np.float32(0.2) * noise if one else noise / np.float32(np.sqrt(rule.shape[-1]))
    inputs = {
        "latents": rng.standard_normal((3, 15, 8), np.float32),
        "text": tuple(rng.standard_normal((3, 4, 24), np.float32) for _ in range(2)),
        "lengths": np.array([4, 2, 0], np.int32),
        "t": np.array([0.1, 0.6, 1.0], np.float32),
    }
    return tensors, inputs


def run_torch(model, inputs) -> np.ndarray:
    mask = torch.from_numpy(np.arange(4) < inputs["lengths"][:, None])
    text = [torch.from_numpy(np.array(layer)) for layer in inputs["text"]]
    with torch.no_grad():
        return model(torch.from_numpy(inputs["latents"]), text, torch.from_numpy(inputs["t"]), GRID, mask).numpy()


@jax.jit
def run_ours(params, tree, inputs):
    positions = joint_positions(*GRID, 4)
    arrays = inputs["latents"], inputs["text"], inputs["lengths"], inputs["t"], positions
    return denoiser.apply(MODEL, params, *arrays, lora=tree)


def test_ours_in_peft(base, tmp_path):
    """Every layer that can have an adapter, written as PEFT's folder and loaded by PEFT."""
    tensors, inputs = base
    config = LoraConfig(rank=4, alpha=6, targets=("*",))
    rng = np.random.default_rng(1)
    shapes = low_rank.abstract(config, denoiser.abstract_params(MODEL))
    tree = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), shapes)
    lora_files.write(tmp_path / "peft", lora.from_tree(tree, MODEL, 6.0), "peft")
    model = peft.PeftModel.from_pretrained(load_release(TorchDenoiser(MODEL), tensors), tmp_path / "peft")
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 2 * 12 + 6
    params = convert.from_release(MODEL, tensors, "random")
    ours = run_ours(params, low_rank.scaled(tree, config.scale), inputs)
    theirs = run_torch(model, inputs)
    # The same float32 operations in another order, as without an adapter.
    assert relative_error(ours, theirs) <= 5e-6
    assert relative_error(theirs, run_torch(load_release(TorchDenoiser(MODEL), tensors), inputs)) > 0.05


def test_theirs_here(base, tmp_path):
    """What PEFT trains and saves, rank-stabilised too, read and applied here."""
    tensors, inputs = base
    for stabilised in (False, True):
        options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "use_rslora": stabilised}
        targets = ["attn.img_qkv", "attn.to_add_out", "img_mlp.w1", "img_mlp.w3", "txt_mlp.w2", "txt_mod.1", "proj_out"]
        torch.manual_seed(0)
        whole = load_release(TorchDenoiser(MODEL), tensors)
        model = peft.get_peft_model(whole, peft.LoraConfig(target_modules=targets, **options)).eval()
        theirs = run_torch(model, inputs)
        model.save_pretrained(tmp_path / f"peft{stabilised}")
        adapter = lora_files.read(tmp_path / f"peft{stabilised}", MODEL)
        assert adapter.rank == 4
        tree = low_rank.scaled(lora.to_tree(adapter, MODEL), adapter.scale)
        ours = run_ours(convert.from_release(MODEL, tensors, "random"), tree, inputs)
        assert relative_error(ours, theirs) <= 5e-6
        merged = lora.merged(
            convert.to_release(MODEL, convert.from_release(MODEL, tensors, "random")), [(adapter, 1.0)]
        )
        assert relative_error(run_torch(load_release(TorchDenoiser(MODEL), merged), inputs), theirs) <= 5e-6
