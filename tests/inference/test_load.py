"""What a pipeline needs of a run: model, codec and text of its config, whatever else the config says."""

import json
import shutil
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

from lens_jax import config as config_files
from lens_jax.encoders.flux import FluxCodecConfig
from lens_jax.encoders.gpt_oss import GptOssTextConfig
from lens_jax.encoders.linear import LinearCodecConfig
from lens_jax.encoders.text import TextFeatures
from lens_jax.errors import LensError, LensWarning
from lens_jax.inference import load
from lens_jax.inference.pipeline import LensPipeline
from lens_jax.models import denoiser
from lens_jax.pretraining.config import TrainConfig


def test_other_fields_and_other_versions_of_a_config(tiny_config):
    values = json.loads(json.dumps(config_files.to_dict(tiny_config)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of another task, say: nothing but the three is read.
        other = {"kind": "Other", **{name: values[name] for name in ("model", "codec", "text")}}
        assert load.run_parts(other, "run") == (tiny_config.model, tiny_config.codec, tiny_config.text)
    values["model"]["router"] = 3
    values["text"]["pooling"] = {"kind": "Mean"}
    del values["model"]["remat"]
    with pytest.warns(LensWarning, match=r"run: ignored, .*: model.router, text.pooling$"):
        assert load.run_parts(values, "run").model == tiny_config.model
    for change, message in (
        ({"codec": {"kind": "WaveletCodec"}}, "run: codec.kind is 'WaveletCodec'; accepted: LinearCodecConfig"),
        ({"codec": {}}, "run: codec.kind is None; accepted"),
        ({"model": {**values["model"], "layers": "many"}}, "run: model.layers is 'many'; expected int"),
        ({"text": 3}, "run: text is 3; expected"),
    ):
        with pytest.raises(LensError, match=message):
            load.run_parts(values | change, "run")
    # Training itself is strict.
    with pytest.raises(LensError, match="unknown field"):
        config_files.from_dict(TrainConfig, values, "run")


@pytest.fixture
def stored(tiny_config, monkeypatch):
    """A stand-in for the store: the parts of a run, and the config that its checkpoint has."""
    from lens_jax.run import store

    config = config_files.to_dict(tiny_config)
    params = denoiser.init(tiny_config.model, jax.random.key(0))
    codec = {"basis": np.eye(48, dtype=np.float32), "mean": np.zeros(48, np.float32), "scale": np.ones(1, np.float32)}
    monkeypatch.setattr(store, "find", lambda path: path)
    monkeypatch.setattr(store, "read_metadata", lambda folder: {"config": config, "sizes": [[16, 12], [16, 16]]})
    parts = {"ema": {"denoiser": params}, "frozen": {"codec": codec}}
    monkeypatch.setattr(store, "load", lambda folder, wanted, mesh, partial: parts)
    return config


def test_a_run_with_other_places_of_its_encoders(stored, monkeypatch):
    asked = []
    monkeypatch.setattr(GptOssTextConfig, "load", lambda self, mesh: asked.append(self))
    pipe = load.from_run("run", dtype="bfloat16")
    assert (pipe.model.dtype, pipe.default_size) == ("bfloat16", (16, 16))
    with pytest.raises(LensError, match=r"run: text_encoder is no option of this run: its SentenceEncoderConfig"):
        load.from_run("run", text_encoder="elsewhere")
    with pytest.raises(LensError, match=r"run: dtyp \(did you mean 'dtype'\?\) is no option of a run; accepted"):
        load.from_run("run", dtyp="float32")
    stored["codec"] = config_files.to_dict(FluxCodecConfig(path="where/it/was"))
    with pytest.raises(
        LensError, match=r"run: codec.path: where/it/was.*; where it is elsewhere now, give autoencoder"
    ):
        load.from_run("run")
    stored["codec"] = config_files.to_dict(LinearCodecConfig())
    stored["text"] = config_files.to_dict(GptOssTextConfig(path="where/it/was", max_conversation=300))
    load.from_run("run", text_encoder="elsewhere", tokenizer="here", date="2026-01-01")
    (text,) = asked
    assert (text.path, text.tokenizer, text.date, text.max_conversation) == ("elsewhere", "here", "2026-01-01", 300)


@pytest.mark.slow
def test_a_single_denoiser_with_the_rest_beside_it(goldens, tmp_path, monkeypatch):
    """A file, or a folder of weights, and --autoencoder, --text-encoder, --tokenizer: what the release draws."""
    release = goldens / "tiny_release"
    embeds = TextFeatures(tuple(np.ones((1, 4, 64), np.float32) for _ in range(4)), np.array([4]))
    options = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "np", "prompt_embeds": embeds}
    expected = load.from_pretrained(release, dtype="float32")(**options).images
    home = tmp_path / "gpt-oss"
    shutil.copytree(release / "text_encoder", home)
    asked = []
    monkeypatch.setattr(load, "find_tokenizer", lambda found: asked.append(found.tokenizer))
    for path in (release / "transformer" / "diffusion_pytorch_model.safetensors", release / "transformer"):
        pipe = load.from_pretrained(path, autoencoder=release, text_encoder=home, dtype="float32", tiling=False)
        np.testing.assert_array_equal(pipe(**options).images, expected)
        assert not pipe.codec.tiling
    (home / "tokenizer.json").write_text("{}")
    load.from_pretrained(path, autoencoder=release, text_encoder=home)
    load.from_pretrained(path, autoencoder=release, text_encoder=release, tokenizer=home)
    assert asked == [None, None, home / "tokenizer.json", home / "tokenizer.json"]
    with pytest.raises(LensError, match=r"no autoencoder and no text_encoder; give --autoencoder PATH, --text-encoder"):
        load.from_pretrained(path)


def test_the_package_is_cheap_to_import():
    code = "import sys, lens_jax; assert 'jax' not in sys.modules; from lens_jax import LensPipeline as P; print(P)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pipeline.LensPipeline" in done.stdout


def test_sizes_far_from_training_are_warned_of():
    pipe = LensPipeline.from_pretrained("small")
    few = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("fox", height=80, width=72, **few)
    for side, pixels in ((128, "16,384"), (32, "1,024")):
        with pytest.warns(LensWarning, match=f"{pixels} pixels, and this model was trained on 4,096"):
            pipe("fox", height=side, width=side, **few)
