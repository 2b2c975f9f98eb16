"""Files that are no network of Lens, or not as such: each is named in one short line."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lens_jax import info
from lens_jax.convert import component, folder, gpt_oss, source, writer
from lens_jax.errors import LensError
from lens_jax.inference import load


def refused(path, match: str) -> None:
    """By every reader of weights."""
    for read in (source.find, lambda p: info.describe(str(p)), load.from_pretrained):
        with pytest.raises(LensError, match=match) as error:
            read(path)
        assert len(str(error.value)) < 400
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.transformer_blocks.0.attn.img_qkv.lora_A.weight",
        "base_model.model.transformer_blocks.0.attn.img_qkv.lora_B.default.weight",
        "lora_unet_transformer_blocks_0_attn_img_qkv.lora_down.weight",
        "diffusion_model.transformer_blocks.0.attn.img_qkv.lokr_w1",
        "transformer_blocks.0.attn.img_qkv.base_layer.weight",
    ],
)
def test_a_lora(name, tmp_path):
    other = {"txt_norm.0.weight": np.ones(3, np.float32)}
    writer.write_file(tmp_path / "x.safetensors", {name: np.zeros((4, 4), np.float32), **other})
    refused(tmp_path / "x.safetensors", "holds a LoRA .*give it beside its model")


def test_pickles_pointers_and_pages(tmp_path):
    with zipfile.ZipFile(tmp_path / "new.pth", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({}))
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    (tmp_path / "hidden.safetensors").write_bytes(pickle.dumps({"a": 1}))
    for name in ("new.pth", "old.ckpt", "hidden.safetensors"):
        refused(tmp_path / name, f"{name}: a pickle of PyTorch, which can run code")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")
    refused(tmp_path / "folder", r"model.bin: a pickle of PyTorch")
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(tmp_path / "lfs.safetensors", "a Git LFS pointer")
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html>")
    refused(tmp_path / "page.safetensors", "a web page, not weights")


def test_a_run_with_other_files_is_a_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "notes.bin").write_bytes(b"PK")
    assert not source.holds_weights(tmp_path)
    with pytest.raises(LensError, match="holds no checkpoint"):
        load.from_pretrained(tmp_path)


def test_a_repository_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(Path("microsoft/Lens-Turbo"), "hf download microsoft/Lens-Turbo")
    refused(tmp_path / "nowhere", "nowhere: no such file or folder$")
    refused(tmp_path / "is" / "nowhere", "nowhere: no such file or folder$")


def test_an_unknown_prefix_is_named_once(goldens, tmp_path, monkeypatch):
    for part in component.COMPONENTS:
        monkeypatch.setitem(part.__dict__, "released", part.config(goldens / "tiny_release"))
    for name in ("transformer", "vae"):
        tensors = folder.open_component(goldens / "tiny_release" / name)
        writer.write_file(tmp_path / "x.safetensors", {f"ema_model.{key}": tensors[key] for key in tensors})
        refused(tmp_path / "x.safetensors", "its names begin with the prefix ema_model., which is not known")


def test_llama_cpp_behind_a_prefix(goldens):
    """The names that stable-diffusion.cpp gives to the tensors of a text encoder of llama.cpp."""
    pytest.importorskip("gguf")
    tensors = {
        "blk.0.attn_sinks.weight": np.ones(4, np.float32), "blk.0.attn_norm.weight": np.ones(8, np.float32),
        "token_embd.weight": np.ones((3, 8), np.float32),
    }  # fmt: skip
    bare = gpt_oss.text_layouts.as_transformers(tensors, "x")
    prefixed = {f"text_encoders.llm.{name}": array for name, array in tensors.items()}
    others = {"first_stage_model.x": np.ones(1, np.float32)}
    assert set(gpt_oss.text_layouts.as_transformers({**prefixed, **others}, "x")) == set(bare)
    assert "model.layers.0.self_attn.sinks" in bare
