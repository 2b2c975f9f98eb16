"""A run as one file: the same images as from the run, and files that are not what they say."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lens_jax import LensPipeline
from lens_jax.convert import packed as packed_files
from lens_jax.convert import writer
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.errors import LensError
from lens_jax.inference import load, packed
from lens_jax.pretraining.job import train

DRAW = {"num_inference_steps": 2, "seed": 3, "output_type": "np"}


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    quiet = dataclasses.replace(tiny_config.samples, every=0)
    config = dataclasses.replace(tiny_config, out=str(tmp_path_factory.mktemp("run") / "run"), steps=4, samples=quiet)
    train(config)
    return config.out


def test_it_draws_what_the_run_draws(run, tmp_path):
    file = packed.write(run, tmp_path / "model.safetensors", "float32", num_inference_steps=7, guidance_scale=2.0)
    mine, theirs = LensPipeline.from_pretrained(file), LensPipeline.from_pretrained(run)
    assert (mine.num_inference_steps, mine.guidance_scale, mine.default_size) == (7, 2.0, theirs.default_size)
    drawn = [pipe("red apple", guidance_scale=3.0, **DRAW).images for pipe in (mine, theirs)]
    np.testing.assert_array_equal(*drawn)
    half = packed.write(run, tmp_path / "half.safetensors")
    assert half.stat().st_size < 0.7 * file.stat().st_size
    pipe = LensPipeline.from_pretrained(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(pipe.params)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(pipe("red apple", guidance_scale=3.0, **DRAW).images, drawn[0], atol=0.02)


def test_files_that_are_not_what_they_say(run, tmp_path):
    file = packed.write(run, tmp_path / "model.safetensors")
    whole = SafetensorsFile(file)
    described = json.loads(whole.metadata[packed_files.KEY])
    for changes, tensors, words in (
        ({"format": 9}, {}, "packed in format 9; this version reads 1"),
        ({"model": {"layers": "two"}}, {}, "model.layers"),
        ({}, {"denoiser/extra": np.zeros(3, np.float32)}, "denoiser/extra is not of this model"),
        ({}, {"codec/mean": np.zeros(5, np.float32)}, r"codec/mean is \[5\] and should be \[48\]"),
    ):
        other = tmp_path / "other.safetensors"
        writer.write_file(
            other, {**whole, **tensors}, metadata={packed_files.KEY: json.dumps({**described, **changes})}
        )
        with pytest.raises(LensError, match=words):
            load.from_pretrained(other)
    writer.write_file(other, dict(whole), metadata={packed_files.KEY: "{"})
    with pytest.raises(LensError, match="not a JSON object"):
        load.from_pretrained(other)
    with pytest.raises(LensError, match=r"variant .*is no option of a packed model"):
        load.from_pretrained(file, variant="turbo")


def test_a_shipped_model_that_was_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_files, "SHIPPED", tmp_path)
    with pytest.raises(LensError, match="the model that comes with the package"):
        packed_files.shipped("small")
    (tmp_path / packed_files.NAMES["small"]).write_bytes(b"not the model")
    (tmp_path / "digests.json").write_text(json.dumps({packed_files.NAMES["small"]: "0" * 64}))
    with pytest.raises(LensError, match="is damaged"):
        packed_files.shipped("small")
