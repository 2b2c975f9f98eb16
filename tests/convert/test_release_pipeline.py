"""A whole release folder, run end to end against the PyTorch package's own answers, and converted there and back."""

import json
import shutil

import numpy as np
import pytest

from lens_jax.bench.distance import distances, relative_distance
from lens_jax.convert import native, source, verify
from lens_jax.convert.release import Variant, read_metadata
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.encoders.gpt_oss import encode_tokens
from lens_jax.encoders.text import TextFeatures
from lens_jax.errors import LensError
from lens_jax.inference.pipeline import LensPipeline


@pytest.fixture(scope="module")
def release(goldens):
    return goldens / "tiny_release"


@pytest.fixture(scope="module")
def golden(release):
    return SafetensorsFile(release / "golden_io.safetensors")


def encode(encoder, golden) -> TextFeatures:
    """Features of the golden's token ids."""
    lengths, drop = golden["attention_mask"].sum(1), int(golden["text_offset"])
    layers = encode_tokens(
        encoder.config.model, encoder.model, golden["input_ids"], lengths, encoder.config.selected, drop=drop
    )
    return TextFeatures(tuple(layers), lengths - drop)


def draw(pipe, golden, **options):
    """What the golden drew: its token ids, its noise, its schedule and guidance."""
    rows, columns = (int(x) for x in golden["latent_hw"])
    return pipe(
        prompt_embeds=encode(pipe.text_encoder, golden),
        latents=golden["initial_latents"],
        height=rows * pipe.codec.tile,
        width=columns * pipe.codec.tile,
        num_inference_steps=int(golden["num_steps"]),
        guidance_scale=float(golden["guidance_scale"]),
        **options,
    ).images


def assert_draws_the_golden(pipe, golden):
    # A right float32 implementation differs by about 1e-6 a network; guidance and four steps multiply it.
    assert relative_distance(draw(pipe, golden, output_type="latent"), golden["final_latents"]) <= 2e-5
    images = draw(pipe, golden, output_type="np")
    expected = np.clip(golden["image"], -1, 1).transpose(0, 2, 3, 1) / 2 + 0.5
    assert relative_distance(images, expected) <= 1e-4
    drawn = np.stack([np.asarray(image) for image in draw(pipe, golden)]).astype(int)
    difference = np.abs(drawn - golden["image_uint8"])
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


def test_release_draws_the_golden(release, golden):
    assert_draws_the_golden(LensPipeline.from_pretrained(release, dtype="float32"), golden)


@pytest.mark.slow
def test_bfloat16_stays_near(release, golden):
    """The distances that docs/checkpoints.md states, and half as much again.

    bfloat16 keeps 8 bits: 0.2 % a rounding, through three networks, guidance and the steps. Which way a sum rounds is
    the compiler's choice: JAX 0.10 and 0.12 differ by 2 % of a distance, by 13 % in the last one. The arithmetic of
    the release would not pass: its latents are 2.3 % off (tests/oracle/test_bfloat16.py).
    """
    pipe, reference = (LensPipeline.from_pretrained(release, dtype=dtype) for dtype in ("bfloat16", "float32"))
    grid = tuple(int(n) for n in golden["latent_hw"])
    steps = int(golden["num_steps"]), float(golden["guidance_scale"])
    features = lambda p: encode(p.text_encoder, golden)
    found = distances(pipe, reference, features, golden["initial_latents"], grid, *steps)
    for name, measured in {
        "velocity": 0.0062, "decode": 0.0082, "latents": 0.012, "image": 0.011,
        "off_by_more_than_1": 0.32, "off_by_more_than_2": 0.14, "off_by_more_than_4": 0.022,
    }.items():  # fmt: skip
        assert 0 < found[name] < 1.5 * measured, name
    assert all(float(value) < 0.027 for value in found["text_median_token"].split(", "))


def test_converted_there_and_back(release, golden, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    native.to_jax(source.find(release), ours, variant="turbo")
    assert verify.to_jax(source.find(release), ours).tensors > 300
    pipe = LensPipeline.from_pretrained(ours, dtype="float32")
    assert (pipe.num_inference_steps, pipe.guidance_scale) == (4, 1.0)
    mark = json.loads((ours / "lens.json").read_text())
    assert mark == {"format": 1, "variant": "turbo", "num_inference_steps": 4, "guidance_scale": 1.0}
    assert_draws_the_golden(pipe, golden)
    native.to_torch(ours, theirs)
    for path in release.rglob("*"):
        if path.is_file() and path.name != "golden_io.safetensors" and "text_encoder" not in path.parts:
            assert (theirs / path.relative_to(release)).read_bytes() == path.read_bytes(), path.name


def test_bfloat16_export(release, tmp_path):
    native.to_jax(source.find(release), tmp_path / "ours", "lens")
    native.to_torch(tmp_path / "ours", tmp_path / "half", dtype="bf16")
    half = SafetensorsFile(tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors")
    original = SafetensorsFile(release / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, array in original.items():
        assert str(half[name].dtype) == "bfloat16"
        np.testing.assert_array_equal(half[name], array.astype(half[name].dtype))


def test_without_a_tokenizer_prompts_are_refused(release):
    pipe = LensPipeline.from_pretrained(release, dtype="float32")
    with pytest.raises(LensError, match=r"no tokenizer .* give prompt_embeds"):
        pipe("a red apple", height=64, width=64)


def test_metadata_of_a_converted_folder(tmp_path):
    """What it says of steps and guidance holds; what cannot be used is named."""
    mark = {"format": 1, "variant": "base", "num_inference_steps": 30, "guidance_scale": 4.5}
    (tmp_path / "lens.json").write_text(json.dumps(mark))
    assert read_metadata(tmp_path) == ("base", Variant(30, 4.5))
    for change, message in (
        ({"format": 2}, "format is 2; this version reads format 1"),
        ({"variant": ["turbo"]}, r"variant is \['turbo'\]; accepted: lens, turbo, base"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; accepted: a number"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; accepted"),
    ):
        (tmp_path / "lens.json").write_text(json.dumps(mark | change))
        with pytest.raises(LensError, match=message):
            read_metadata(tmp_path)


def test_nothing_is_left_when_a_conversion_fails(release, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(release, broken)
    config = broken / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "latent_channels": 3}))
    with pytest.raises(LensError):
        native.to_jax(source.find(broken), tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"broken"}
    with pytest.raises(LensError, match="no release folder"):
        native.to_jax(source.find(tmp_path), tmp_path / "out")
    with pytest.raises(LensError, match=r"variant 'tubro'.*did you mean 'turbo'"):
        native.to_jax(source.find(release), tmp_path / "out", variant="tubro")
