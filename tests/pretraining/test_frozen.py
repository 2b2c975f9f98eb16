"""Training reads through the released autoencoder and text encoder, on one device and on meshes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lens_jax import config as config_files
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.data.buckets import Bucket
from lens_jax.data.mixture import Shape
from lens_jax.encoders.flux import FluxCodecConfig
from lens_jax.encoders.gpt_oss import GptOssTextConfig
from lens_jax.encoders.images import encode_rows
from lens_jax.errors import LensError
from lens_jax.inference.pipeline import LensPipeline
from lens_jax.pretraining.features import Features
from lens_jax.pretraining.job import train
from lens_jax.run.log import read_metrics

# MORE_MESHES, one of which cuts the sequence, take a minute and a half more.
MESHES = ("2,2,2,1",)
MORE_MESHES = ("1,2,2,2", "8,1,1,1", "1,8,1,1", "1,4,2,1")


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def test_latents_are_those_of_the_release(small_lens, goldens):
    answers = SafetensorsFile(goldens / "tiny_release" / "golden_io.safetensors")
    pixels = np.round((answers["pixels"].transpose(0, 2, 3, 1) + 1) * 127.5).astype(np.uint8)
    latents = encode_rows(small_lens.codec, small_lens.codec.load().params, pixels, None)
    # The images are rounded to 8 bits here: half a level of 255 is 0.4 % of what they span.
    assert relative_error(latents, answers["normalized_latents"]) <= 1e-2


@pytest.mark.slow
def test_features_are_those_of_the_pipeline(small_lens, small_release):
    """The sampler's encoder and training's agree; a blank caption is no text; a long one keeps what follows it."""
    text = small_lens.text
    prompts = ["a red apple, two cats", "", "word " * 60]
    features = Features(small_lens, [Shape(Bucket(64, 64))])
    batch = {"captions": prompts, "bucket": (64, 64), "text_class": 0, "step": 0}
    batch["pixels"] = np.zeros((3, 64, 64, 3), np.uint8)
    with pytest.warns(UserWarning, match="1 of 3 captions so far .* lost their end"):
        batch = features.encode({}, features.read(batch))
    # The sampler's: of the whole conversation, whatever a run's limit is.
    expected = dataclasses.replace(text, path=str(small_release), max_conversation=512).load().encode(prompts[:2])
    assert np.asarray(batch["text_lengths"]).tolist() == [*expected.lengths, text.max_tokens]
    assert expected.lengths[1] == 0
    for layer, wanted in zip(batch["text"], expected.layers):
        n = expected.lengths[0]
        assert relative_error(layer[0, :n], wanted[0, :n]) <= 1e-5
        assert not np.any(np.asarray(layer)[0, n:])


@pytest.mark.slow
@pytest.mark.parametrize("meshes", [MESHES, MORE_MESHES])
def test_on_meshes(small_lens, tmp_path, meshes):
    """Latents, features and a sampled posterior of eight rows, weights cut every way, equal those of one device."""
    (tmp_path / "config.json").write_text(json.dumps(config_files.to_dict(small_lens)))
    script = Path(__file__).with_name("frozen_on_meshes.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "config.json"), *meshes],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for line in map(json.loads, done.stdout.splitlines()):
        # Sums in another order, and convolutions of other batch sizes.
        assert max(line["errors"].values()) <= 1e-5, line
    assert len(done.stdout.splitlines()) == len(meshes)


@pytest.mark.slow
def test_a_run_trains_resumes_and_samples(small_lens, tmp_path):
    whole = train(dataclasses.replace(small_lens, out=str(tmp_path / "whole")))
    undrawn = dataclasses.replace(small_lens.samples, every=0)
    out = dataclasses.replace(small_lens, out=str(tmp_path / "parts"), samples=undrawn)
    train(dataclasses.replace(out, steps=4))
    parts = train(out)
    for a, b in zip(_leaves(whole.state.params), _leaves(parts.state.params)):
        np.testing.assert_array_equal(a, b)
    losses = [record["loss"] for record in read_metrics(tmp_path / "parts" / "metrics.jsonl", "train")]
    assert np.all(np.isfinite(losses))
    (sheet,) = (tmp_path / "whole" / "samples").glob("*.png")
    assert sheet.stat().st_size > 1000
    # With the head of its text encoder too, for the reasoner, which is not asked here.
    pipe = LensPipeline.from_pretrained(tmp_path / "parts", reasoner="local")
    assert "unembed" in pipe.text_encoder.model
    (image,) = pipe("red apple", num_inference_steps=2, height=64, width=64, reasoner=False).images
    assert image.size == (64, 64)


def test_what_does_not_fit_is_named(small_lens, goldens):
    model = dataclasses.replace(small_lens.text.model, layers=6)
    with pytest.raises(LensError, match=r"text.model.layers is 6, but the weights in .*text_encoder have 4"):
        Features(dataclasses.replace(small_lens, text=dataclasses.replace(small_lens.text, model=model)), [])
    golden = {"path": str(goldens / "tiny_release"), "model": _golden_text(goldens), "selected": (1,)}
    text = dataclasses.replace(small_lens.text, **golden)
    with pytest.raises(LensError, match=r"text.path .*: no tokenizer"):
        Features(dataclasses.replace(small_lens, text=text), [])
    with pytest.raises(LensError, match=r"codec.path: /nowhere"):
        Features(dataclasses.replace(small_lens, codec=FluxCodecConfig(path="/nowhere")), [])
    with pytest.raises(LensError, match=r"text.max_conversation is 100; it must be at least 119"):
        GptOssTextConfig(max_conversation=100)


def _golden_text(goldens):
    from lens_jax.convert import gpt_oss

    return gpt_oss.read_config(goldens / "tiny_release" / "text_encoder" / "config.json")


def _leaves(tree):
    import jax

    return jax.tree.leaves(jax.device_get(tree))
