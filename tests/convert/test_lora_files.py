"""Adapter files: written in each style and read back equal, read as others write them, refused by name."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lens_jax.convert import denoiser as release
from lens_jax.convert import lora, lora_files, writer
from lens_jax.convert.lora_names import STYLES
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.errors import LensError
from lens_jax.models import denoiser
from lens_jax.models import lora as low_rank
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.lora import LoraConfig

TINY = DenoiserConfig(
    layers=2, heads=2, head_dim=16, latent_channels=8, text_width=12, text_layers=2, rope_axes=(4, 6, 6),
    dtype="float32",
)  # fmt: skip
CONFIG = LoraConfig(rank=4, alpha=6.5, targets=("*",))


def random_tree(config=CONFIG, seed=0) -> dict:
    rng = np.random.default_rng(seed)
    shapes = low_rank.abstract(config, denoiser.abstract_params(TINY))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def tree():
    return random_tree()


@pytest.fixture(scope="module")
def adapter(tree):
    return lora.from_tree(tree, TINY, 6.5, base_model="runs/base", trigger="a photo of sks dog")


@pytest.fixture(scope="module")
def kernels():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), denoiser.abstract_params(TINY))


def name_of(tmp_path, style):
    return tmp_path / (style if style == "peft" else f"{style}.safetensors")


def assert_same(found, expected):
    assert (found.rank, found.alpha) == (expected.rank, expected.alpha)
    assert found.factors.keys() == expected.factors.keys()
    for module, (a, b) in expected.factors.items():
        np.testing.assert_array_equal(found.factors[module][0], a, err_msg=module)
        np.testing.assert_array_equal(found.factors[module][1], b, err_msg=module)


def assert_trees_equal(found, expected):
    found, expected = flatten_dict(found, sep="/"), flatten_dict(expected, sep="/")
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize("style", STYLES)
def test_written_and_read_back(adapter, tree, style, tmp_path):
    path = name_of(tmp_path, style)
    lora_files.write(path, adapter, style)
    found = lora_files.read(path, TINY)
    assert_same(found, adapter)
    assert (found.base_model, found.trigger) == ("runs/base", "a photo of sks dog")
    assert_trees_equal(lora.to_tree(found, TINY), tree)
    with pytest.raises(LensError, match="there already"):
        lora_files.write(path, adapter, style)


def test_names_of_each_style(adapter, tmp_path):
    """Those that the programs look for (release 6.5), and where each has alpha."""
    block = "transformer_blocks.1.attn.img_qkv"
    names = {
        "comfy": (f"diffusion_model.{block}.lora_A.weight", f"diffusion_model.{block}.alpha"),
        "peft": (f"base_model.model.{block}.lora_B.weight", None),
        "diffusers": (f"transformer.{block}.lora_A.weight", None),
        "kohya": (
            "lora_unet_transformer_blocks_1_attn_img_qkv.lora_down.weight",
            "lora_unet_transformer_blocks_1_attn_img_qkv.alpha",
        ),
    }
    modules = len(adapter.factors)
    assert modules == 2 * 12 + 6
    for style, (weight, alpha) in names.items():
        path = name_of(tmp_path, style)
        lora_files.write(path, adapter, style)
        file = SafetensorsFile(path / lora_files.PEFT_WEIGHTS if style == "peft" else path)
        assert weight in file
        assert len(file) == modules * (3 if alpha else 2)
        assert file.metadata["trigger_text"] == "a photo of sks dog"
        if alpha:
            assert float(file[alpha]) == 6.5
    peft = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (peft["r"], peft["lora_alpha"], peft["peft_type"]) == (4, 6.5, "LORA")
    assert len(peft["target_modules"]) == modules
    header = SafetensorsFile(tmp_path / "diffusers.safetensors").metadata["lora_adapter_metadata"]
    assert json.loads(header)["transformer.lora_alpha"] == 6.5


def test_what_is_added_is_a_product_by_hand(adapter, tree, kernels):
    """In PyTorch's terms W [out, in] + alpha / rank B A; in ours the same kernel, for every layer."""
    scaled = low_rank.scaled(tree, 6.5 / 4)
    ours = release.to_release(TINY, jax.tree.map(np.asarray, low_rank.merged(kernels, scaled)))
    theirs = lora.merged(release.to_release(TINY, kernels), [(adapter, 1.0)])
    assert ours.specs == theirs.specs
    changed = 0
    for name in theirs:
        np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-5, atol=1e-5, err_msg=name)
        changed += not np.array_equal(theirs[name], release.to_release(TINY, kernels)[name])
    assert changed == len(adapter.factors)
    half = lora.merged(
        release.to_release(TINY, kernels), [(adapter, 0.25), (adapter, 0.25)], np.dtype(ml_dtypes.bfloat16)
    )
    name = "transformer_blocks.1.img_mlp.w3.weight"
    a, b = adapter.factors[name.removesuffix(".weight")]
    exact = release.to_release(TINY, kernels)[name] + 0.5 * 6.5 / 4 * (b @ a)
    np.testing.assert_allclose(half[name].astype(np.float32), exact, rtol=2**-8)


def plain(adapter) -> dict[str, np.ndarray]:
    """PEFT's bare names."""
    made = {}
    for module, (a, b) in adapter.factors.items():
        made |= {f"{module}.lora_A.weight": np.asarray(a), f"{module}.lora_B.weight": np.asarray(b)}
    return made


def save(tmp_path, tensors, metadata=None):
    path = tmp_path / "x.safetensors"
    writer.write_file(path, tensors, metadata=metadata)
    return path


def named(start: str, *pairs: tuple[str, str]):
    """How somebody writes a bare name."""

    def rename(name: str) -> str:
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        return start + name

    return rename


@pytest.mark.parametrize(
    ("rename", "alpha"),
    [
        (named(""), "lora_alpha"),
        (named("diffusion_model.", ("_A.", "_A.default."), ("_B.", "_B.default.")), "alpha"),
        (named("base_model.model.transformer."), "alpha"),
        (named("model.diffusion_model.", ("to_out.0", "to_out"), ("_mod.1", "_mod")), "alpha"),
        (named("transformer.", ("lora_A", "lora.down"), ("lora_B", "lora.up")), "ss_network_alpha"),
    ],
    ids=["bare", "adapter name", "peft of a pipeline", "mlx modules", "old diffusers"],
)
def test_as_others_write_it(adapter, tree, tmp_path, rename, alpha):
    path = save(tmp_path, {rename(name): array for name, array in plain(adapter).items()}, {alpha: "6.5"})
    found = lora_files.read(path, TINY)
    assert found.alpha == 6.5
    assert_trees_equal(lora.to_tree(found, TINY), tree)


def test_alpha(adapter, tmp_path):
    """Nowhere: the rank. Of each module another: into B. Rank-stabilised, as PEFT has it."""
    tensors = plain(adapter)
    assert lora_files.read(save(tmp_path, tensors), TINY).scale == 1
    some = "transformer_blocks.0.attn.to_out.0"
    alphas = {f"{name}.alpha": np.array(8 if name == some else 2, np.float32) for name in adapter.factors}
    found = lora_files.read(save(tmp_path, tensors | alphas), TINY)
    for module in (some, "proj_out"):
        a, b = adapter.factors[module]
        np.testing.assert_allclose(found.change(module), (8 if module == some else 2) / 4 * (b @ a), rtol=1e-6)
    lora_files.write(tmp_path / "peft", adapter, "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_rslora": True}))
    assert lora_files.read(tmp_path / "peft", TINY).scale == 6.5 / 4**0.5


@pytest.mark.parametrize("shared", [False, True], ids=["three", "one A"])
def test_split_projections_are_our_fused_one(tmp_path, shared):
    """q, k and v that lie apart: block by block in B, or where they share A (a fused one that was cut) as it was."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    tensors, expected = {}, {}
    for i in range(2):
        for parts, fused in (("to_q to_k to_v", "img_qkv"), ("add_q_proj add_v_proj", "txt_qkv")):
            whole, first = np.zeros((96, 32), np.float32), draw(4, 32)
            for part in parts.split():
                a, b = (first if shared else draw(4, 32)), draw(32, 4)
                start = f"transformer.transformer_blocks.{i}.attn.{part}"
                tensors |= {f"{start}.lora_A.weight": a, f"{start}.lora_B.weight": b}
                third = ["q", "k", "v"].index(part.removesuffix("_proj")[-1])
                whole[32 * third : 32 * third + 32] = b @ a
            expected[f"transformer_blocks.{i}.attn.{fused}"] = whole
        start = f"transformer.transformer_blocks.{i}.attn.to_out.0"
        tensors |= {f"{start}.lora_A.weight": draw(4, 32), f"{start}.lora_B.weight": draw(32, 4)}
    found = lora_files.read(save(tmp_path, tensors), TINY)
    for module, change in expected.items():
        np.testing.assert_allclose(found.change(module), change, rtol=1e-5, atol=1e-6, err_msg=module)
    tree = lora.to_tree(found, TINY)
    assert tree["blocks"]["image"]["qkv"]["a"].shape == (2, 32, 4 if shared else 12)
    kernel = np.einsum("lwr,lrphd->lwphd", *(tree["blocks"]["image"]["qkv"][name] for name in "ab"))
    wanted = np.stack([expected[f"transformer_blocks.{i}.attn.img_qkv"].T for i in range(2)])
    np.testing.assert_allclose(kernel.reshape(2, 32, 96), wanted, rtol=1e-5, atol=1e-5)


def test_blocks_without_an_adapter_are_left_as_they_are(adapter, tmp_path):
    one = {name: array for name, array in plain(adapter).items() if "blocks.1.attn.to_add_out" in name}
    tree = lora.to_tree(lora_files.read(save(tmp_path, one), TINY), TINY)
    assert list(flatten_dict(tree, sep="/")) == ["blocks/text/out/a", "blocks/text/out/b"]
    assert not tree["blocks"]["text"]["out"]["a"][0].any()
    np.testing.assert_array_equal(tree["blocks"]["text"]["out"]["a"][1].reshape(32, 4), next(iter(one.values())).T)


def test_lokr_is_a_change_of_full_rank(kernels, tmp_path):
    """Whole factors and products of two; LyCORIS counts alpha / rank only where one is a product."""
    rng = np.random.default_rng(4)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    qkv, gate = "transformer_blocks.1.attn.img_qkv", "transformer_blocks.0.txt_mlp.w1"
    whole, factored = (draw(4, 8), draw(24, 4)), (draw(5, 4), draw(17, 3), draw(3, 8))
    tensors = {
        f"lycoris_{qkv.replace('.', '_')}.lokr_w1": whole[0],
        f"lycoris_{qkv.replace('.', '_')}.lokr_w2": whole[1],
        f"lycoris_{qkv.replace('.', '_')}.alpha": np.array(7, np.float32),
        f"diffusion_model.{gate}.lokr_w1": factored[0],
        f"diffusion_model.{gate}.lokr_w2_a": factored[1],
        f"diffusion_model.{gate}.lokr_w2_b": factored[2],
        f"diffusion_model.{gate}.alpha": np.array(6, np.float32),
    }
    found = lora_files.read(save(tmp_path, tensors), TINY)
    expected = {qkv: np.kron(*whole), gate: 6 / 3 * np.kron(factored[0], factored[1] @ factored[2])}
    before = release.to_release(TINY, kernels)
    after = lora.merged(before, [(found, 0.5)])
    for module, change in expected.items():
        name = f"{module}.weight"
        np.testing.assert_allclose(after[name], before[name] + 0.5 * change, rtol=1e-5, atol=1e-5)
    changes = lora.full_changes(found, TINY)
    assert list(changes) == ["blocks/image/qkv/kernel", "blocks/text/gate_up/kernel"]
    np.testing.assert_allclose(changes["blocks/text/gate_up/kernel"][0, :, 0], expected[gate].T, rtol=1e-6)
    assert not changes["blocks/text/gate_up/kernel"][0, :, 1].any()


def refused(tmp_path, tensors, message, metadata=None):
    with pytest.raises(LensError, match=message) as found:
        lora_files.read(save(tmp_path, tensors, metadata), TINY)
    assert "\n" not in str(found.value)


def test_bad_input_is_one_line(adapter, tmp_path):
    tensors = plain(adapter)
    a, b = "transformer_blocks.0.attn.img_qkv.lora_A.weight", "transformer_blocks.0.attn.img_qkv.lora_B.weight"
    more = {"text_model.q.lora_A.weight": np.ones((4, 4), np.float32), f"{a}.dora_scale": np.ones(4, np.float32)}
    # All of them.
    refused(tmp_path, tensors | more, r"2 of 62 tensors mean nothing .*text_model\.q\.lora_A\.weight, .*dora_scale")
    refused(tmp_path, {a: tensors[a]}, "without the other factor")
    refused(tmp_path, tensors | {a: tensors[a][:2], b: tensors[b][:, :2]}, r"mixed ranks \(2 in 1 modules, 4 in 29")
    refused(tmp_path, tensors | {a: tensors[a][:2]}, r"is \[2, 32\] and .* \[96, 4\]")
    refused(tmp_path, tensors | {a: np.full_like(tensors[a], np.nan)}, "img_qkv: not finite")
    refused(tmp_path, tensors | {a: tensors[a].astype(np.int32)}, "is int32; accepted: float32")
    refused(tmp_path, tensors, "alpha is 'much'", {"alpha": "much"})
    refused(tmp_path, tensors, "is no JSON object", {"lora_adapter_metadata": "["})
    refused(tmp_path, {}, "holds no adapter")
    wide = {a: np.ones((4, 64), np.float32), b: np.ones((192, 4), np.float32)}
    refused(tmp_path, wide, r"an adapter of another model: .* is \[192, 64\], this model has \[96, 32\]")
    deep = {name.replace("blocks.0", "blocks.7"): array for name, array in tensors.items() if "blocks.0.attn" in name}
    refused(tmp_path, deep, r"8 of 8 tensors mean nothing in this model .*blocks\.7\.attn\.to_out")
    # 4 PB of a product from 8 MB of file: never made.
    large = {
        "proj_out.lokr_w1": np.ones((1, 1 << 20), np.float32),
        "proj_out.lokr_w2": np.ones((1 << 20, 1), np.float32),
    }
    refused(tmp_path, large, r"LoKr of proj_out is \[1048576, 1048576\], this model has \[8, 32\]")
    with pytest.raises(LensError, match="no such file or folder"):
        lora_files.read(tmp_path / "absent", TINY)
    with pytest.raises(LensError, match=r"is one file; accepted: NAME\.safetensors"):
        lora_files.write(tmp_path / "folder", adapter, "kohya")
