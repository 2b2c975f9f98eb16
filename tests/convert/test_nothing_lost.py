"""A conversion ends with all that its source has, or with an error: configs, tokenizer, which layers are read."""

import dataclasses
import hashlib
import json
import os
import shutil

import jax
import numpy as np
import pytest

from lens_jax import info
from lens_jax.convert import command, denoiser, folder, gpt_oss, native, release, source, verify
from lens_jax.encoders.gpt_oss import GptOssTextConfig
from lens_jax.errors import LensError
from lens_jax.inference import load
from lens_jax.models.denoiser import init
from lens_jax.run import store


@pytest.fixture
def tiny(goldens, tmp_path):
    """The small release with a tokenizer, a licence and a scheduler of its own."""
    place = tmp_path / "Lens"
    shutil.copytree(goldens / "tiny_release", place)
    (place / "tokenizer").mkdir(exist_ok=True)
    (place / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"}')
    (place / "LICENSE").write_text("MIT")
    (place / "scheduler").mkdir(exist_ok=True)
    (place / "scheduler" / "scheduler_config.json").write_text('{"shift": 7.0}')
    return place


def small(place) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in native.small_files(place)}


def hub_cache(tiny, root):
    """The same files as the hub's client keeps them: links from a snapshot to blobs."""
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    for path in filter(lambda p: p.is_file(), tiny.rglob("*")):
        blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = root / "snapshots" / "abc" / path.relative_to(tiny)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return root / "snapshots" / "abc"


@pytest.mark.parametrize("kind", ["cache", "snapshot", "no index", "one network"])
def test_all_small_files_are_kept(kind, tiny, tmp_path):
    expected = small(tiny)
    if kind == "no index":
        (tiny / "model_index.json").unlink()
    elif kind == "one network":
        for name in ("vae", "text_encoder"):
            shutil.rmtree(tiny / name)
        expected = {name: data for name, data in expected.items() if not name.startswith(("vae", "text_encoder"))}
    else:
        place = hub_cache(tiny, tmp_path / "models--X--Lens-Turbo")
        tiny = place if kind == "snapshot" else place.parents[1]
    native.to_jax(source.find(tiny), tmp_path / "out")
    kept = small(tmp_path / "out" / "release")
    assert {**kept, "model_index.json": b""} == {**expected, "model_index.json": b""}
    variant = release.read_metadata(tmp_path / "out")[0]
    assert variant == ("turbo" if kind in ("cache", "snapshot") else "lens")


def test_a_link_to_nothing_is_said(tiny, tmp_path):
    place = hub_cache(tiny, tmp_path / "models--X--Lens")
    os.path.realpath(place / "tokenizer" / "tokenizer.json")
    os.unlink(os.path.realpath(place / "tokenizer" / "tokenizer.json"))
    with pytest.raises(LensError, match=r"tokenizer.json: a link to nothing; its download has not ended"):
        native.to_jax(source.find(place), tmp_path / "out")
    (tmp_path / "secret.json").write_text("{}")
    (tiny / "more.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(LensError, match="outside its folder"):
        native.to_jax(source.find(tiny), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "variant"),
    [
        ("hub/models--X--Lens-Turbo/snapshots/abc", "turbo"),
        ("Lens_Base/transformer", "base"),
        ("turbo/Lens/x.safetensors", "lens"),
        ("diffusion_models/lens_turbo_mxfp8.safetensors", "turbo"),
        ("LensTurbo", "turbo"),
        ("mlx-community/Lens-3.8B-8bit", "lens"),
        ("base/models/abc", None),
        ("lens-jax/checkpoints/abc", None),
        ("lensing/abc", None),
        ("turbo", "turbo"),
    ],
)
def test_the_variant_is_in_the_path(path, variant, monkeypatch, tmp_path):
    monkeypatch.chdir("/")
    assert release.variant_of(release.Path("/") / path) == variant


def test_a_variant_nobody_says_is_asked_for(goldens, tmp_path):
    with pytest.raises(LensError, match="give --variant lens"):
        native.to_jax(source.find(goldens / "tiny_release"), tmp_path / "out")
    with pytest.raises(LensError, match=r"variant \['turbo'\]"):
        release.variant_of(tmp_path, ["turbo"])


def test_a_run_says_which_layers_it_read(goldens, tmp_path, monkeypatch, capsys):
    """The export names them in their order, is read back, and --verify sees a config that was changed."""
    model = denoiser.read_config(goldens / "tiny_release" / "transformer" / "config.json", dtype="float32")
    text = gpt_oss.read_config(goldens / "tiny_release" / "text_encoder" / "config.json", dtype="float32")
    layers = (4, 1, 2, 5)[: model.text_layers]
    params = jax.tree.map(np.asarray, init(model, jax.random.key(0)))
    config = {"steps": 1, "init_from": "hub/models--X--Lens-Turbo/snapshots/abc"}
    parts = load.RunParts(model, None, GptOssTextConfig(selected=layers, model=text))
    monkeypatch.setattr(load, "run_parts", lambda *_: parts)
    monkeypatch.setattr(store, "find", lambda path: path)
    monkeypatch.setattr(store, "read_metadata", lambda path: {"config": config})
    monkeypatch.setattr(store, "load", lambda *_, **__: {"ema": {"denoiser": params}})
    (tmp_path / "run").mkdir()
    out = tmp_path / "out"
    command.to_torch(command.ToTorch(str(tmp_path / "run"), str(out), verify=True))
    place = out / "transformer" / "config.json"
    assert tuple(folder.read_json(place)["selected_layer_index"]) == layers
    info.describe(str(out))
    assert f"reads layers {', '.join(map(str, layers))}" in capsys.readouterr().out
    native.to_jax(source.find(out), tmp_path / "back")
    assert release.read_metadata(tmp_path / "back")[0] == "turbo"

    trained = native.Trained(model, params, layers, "Lens-Turbo, trained by lens-jax")
    place.write_text(json.dumps({**folder.read_json(place), "selected_layer_index": sorted(layers)}))
    with pytest.raises(LensError, match="something else than the run"):
        verify.to_torch(trained, out)
    with pytest.raises(LensError, match="no place for model"):
        denoiser.config_to_release(dataclasses.replace(model, rope_theta=5.0), layers)


@pytest.mark.parametrize("taps", [[1.5], ["1"], [True], [1, 1], [-1], [None], {"a": 1}])
def test_selected_layers_of_a_wrong_kind(goldens, taps):
    values = folder.read_json(goldens / "tiny_release" / "transformer" / "config.json")
    with pytest.raises(LensError, match="selected_layer_index is"):
        denoiser.config_from_release({**values, "selected_layer_index": taps}, "config.json")


def test_layers_come_in_the_order_they_are_asked_for(goldens):
    from lens_jax.encoders.gpt_oss import encode_tokens

    path = goldens / "tiny_release" / "text_encoder"
    config = gpt_oss.read_config(path / "config.json", dtype="float32")
    params = gpt_oss.from_release(config, folder.open_component(path), "te", head=False)
    ids = np.arange(6)[None]
    one, other = (np.asarray(encode_tokens(config, params, ids, [6], taps)) for taps in ((1, 4), (4, 1)))
    np.testing.assert_array_equal(one, other[::-1])


def test_a_pointer_is_no_tokenizer(tiny, tmp_path):
    (tiny / "tokenizer" / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(LensError, match=r"tokenizer.json: a Git LFS pointer"):
        native.to_jax(source.find(tiny), tmp_path / "out")


def test_what_is_not_copied_is_said(tiny, tmp_path, capsys):
    (tiny / "assets").mkdir()
    (tiny / "assets" / "[x].png").write_bytes(b"1")
    command.to_jax(command.ToJax(str(tiny), str(tmp_path / "out")))
    said = capsys.readouterr().out.split("not copied: ")[1].splitlines()[0].split(", ")
    assert "assets/[x].png" in said
    assert not any(name.startswith(("transformer/", "vae/", "text_encoder/", "tokenizer/")) for name in said)


def test_the_tokenizer_beside_a_text_encoder_is_taken(goldens, tmp_path):
    shutil.copytree(goldens / "tiny_release" / "text_encoder", tmp_path / "gpt-oss-20b")
    (tmp_path / "gpt-oss-20b" / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "gpt-oss-20b" / "generation_config.json").write_text('{"do_sample": true}')
    native.to_jax(source.find(tmp_path / "gpt-oss-20b"), tmp_path / "out")
    assert (tmp_path / "out" / "release" / "tokenizer" / "tokenizer.json").is_file()
    assert "do_sample" in (tmp_path / "out" / "release" / "text_encoder" / "generation_config.json").read_text()


def test_a_full_disk_is_one_line(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(LensError, match="out: cannot be written: No space left on device"):
        native.to_jax(source.find(tiny), tmp_path / "out")
    assert not any(path.name.startswith(".out") for path in tmp_path.iterdir())


@pytest.mark.parametrize("place", [None, 3, ["Lens"], b"Lens", "a\0b"])
def test_a_path_of_a_wrong_type(goldens, place):
    for read in (load.from_pretrained, source.find):
        with pytest.raises(LensError, match="a checkpoint is"):
            read(place)
    if place:
        with pytest.raises(LensError, match="denoiser is"):
            source.find(goldens / "tiny_release", {"denoiser": place})
