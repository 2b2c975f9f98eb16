"""A whole release folder, run end to end against the PyTorch package's own answers, and converted there and back."""

import json
import shutil

import numpy as np
import pytest

from lens_jax.convert import native, source
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.errors import LensError
from lens_jax.pipeline import LensPipeline
from lens_jax.text.encoder import TextFeatures
from lens_jax.text.gpt_oss import encode_tokens


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def release(goldens):
    return goldens / "tiny_release"


@pytest.fixture(scope="module")
def golden(release):
    return SafetensorsFile(release / "golden_io.safetensors")


def draw(pipe, golden, **options):
    """What the golden drew: its token ids, its noise, its schedule and guidance."""
    lengths = golden["attention_mask"].sum(1)
    drop = int(golden["text_offset"])
    encoder = pipe.text_encoder
    layers = encode_tokens(
        encoder.model, encoder.params, golden["input_ids"], lengths, encoder.config.selected, drop=drop
    )
    rows, columns = (int(x) for x in golden["latent_hw"])
    return pipe(
        prompt_embeds=TextFeatures(tuple(layers), lengths - drop),
        latents=golden["initial_latents"],
        height=rows * pipe.codec.tile,
        width=columns * pipe.codec.tile,
        num_inference_steps=int(golden["num_steps"]),
        guidance_scale=float(golden["guidance_scale"]),
        **options,
    ).images


def assert_draws_the_golden(pipe, golden):
    # A right float32 implementation differs by about 1e-6 a network; guidance and four steps multiply it.
    assert relative_error(draw(pipe, golden, output_type="latent"), golden["final_latents"]) <= 2e-5
    images = draw(pipe, golden, output_type="np")
    expected = np.clip(golden["image"], -1, 1).transpose(0, 2, 3, 1) / 2 + 0.5
    assert relative_error(images, expected) <= 1e-4
    pictures = np.stack([np.asarray(image) for image in draw(pipe, golden)]).astype(int)
    difference = np.abs(pictures - golden["image_uint8"])
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


def test_release_draws_the_golden(release, golden):
    assert_draws_the_golden(LensPipeline.from_pretrained(release, dtype="float32"), golden)


def test_bfloat16_stays_near(release, golden):
    """bfloat16 keeps 8 bits: 0.4 % a rounding, through two networks, guidance and the steps."""
    pipe = LensPipeline.from_pretrained(release, dtype="bfloat16")
    latents = draw(pipe, golden, output_type="latent")
    assert 1e-4 < relative_error(latents, golden["final_latents"]) < 5e-2


def test_converted_there_and_back(release, golden, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    native.to_jax(source.find(release), ours, variant="turbo")
    assert native.verify(source.find(release), ours) > 300
    pipe = LensPipeline.from_pretrained(ours, dtype="float32")
    assert (pipe.num_inference_steps, pipe.guidance_scale) == (4, 1.0)
    assert_draws_the_golden(pipe, golden)
    native.to_torch(ours, theirs)
    for path in release.rglob("*"):
        if path.is_file() and path.name != "golden_io.safetensors" and "text_encoder" not in path.parts:
            assert (theirs / path.relative_to(release)).read_bytes() == path.read_bytes(), path.name


def test_bfloat16_export(release, tmp_path):
    native.to_jax(source.find(release), tmp_path / "ours")
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
