"""Folders written by `lens-jax convert to-torch`, loaded by the libraries they are for: no key missing or over."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from transformers import GptOssForCausalLM, Mxfp4Config

from lens_jax import cli
from lens_jax.bench.torch_denoiser import TorchDenoiser, load_release
from lens_jax.convert import denoiser, folder, writer
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.models.denoiser import apply
from lens_jax.models.layers import joint_positions
from lens_jax.pretraining.job import train

pytestmark = pytest.mark.oracle

WAYS = {"as it is": (), "bf16": ("--dtype", "bf16"), "single file": ("--single-file",)}


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def run(*argv) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in argv])
    assert stop.value.code == 0


@pytest.fixture(scope="module")
def ours(goldens, tmp_path_factory):
    """The small release in our layout."""
    place = tmp_path_factory.mktemp("ours") / "lens"
    run("convert", "to-jax", goldens / "tiny_release", place, "--variant", "lens")
    return place


@pytest.fixture(scope="module", params=WAYS)
def exported(ours, request, tmp_path_factory):
    """Options, and the release written with them."""
    options = WAYS[request.param]
    place = tmp_path_factory.mktemp("theirs") / "lens"
    run("convert", "to-torch", ours, place, *options)
    return options, place


@pytest.fixture(scope="module")
def answers(goldens):
    return SafetensorsFile(goldens / "tiny_release" / "golden_io.safetensors")


def load_vae(place):
    model, report = AutoencoderKLFlux2.from_pretrained(place, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def load_text_encoder(place, **options):
    model, report = GptOssForCausalLM.from_pretrained(
        place, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model.eval()


def check_vae(model, answers):
    with torch.no_grad():
        mean = model.encode(torch.from_numpy(np.array(answers["pixels"]))).latent_dist.mean
    # The same library as the golden's, on another processor.
    assert relative_error(mean, answers["posterior_mean"]) <= 1e-5


def check_text_encoder(model, answers):
    mask = np.array(answers["attention_mask"])
    with torch.no_grad():
        scores = model(
            torch.from_numpy(np.array(answers["input_ids"])).long(), attention_mask=torch.from_numpy(mask).long()
        ).logits
    real = mask.astype(bool)
    assert relative_error(scores.numpy()[real], answers["logits"][real]) <= 1e-5


def test_vae(exported, answers):
    check_vae(load_vae(exported[1] / "vae"), answers)


# On a CPU transformers unpacks by itself what it is not told to unpack.
@pytest.mark.parametrize("options", [{"quantization_config": Mxfp4Config(dequantize=True)}, {}], ids=["asked", "not"])
def test_text_encoder(exported, answers, options):
    check_text_encoder(load_text_encoder(exported[1] / "text_encoder", **options), answers)


def test_scheduler(exported, answers):
    """The config file that goes along unchanged gives the sigmas and timesteps of the golden."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(exported[1] / "scheduler")
    steps = int(answers["num_steps"].item())
    rows, columns = (int(n) for n in answers["latent_hw"])
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=compute_empirical_mu(rows * columns, steps))
    np.testing.assert_allclose(scheduler.sigmas.numpy(), answers["sigmas"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), answers["timesteps"], rtol=0, atol=1e-3)


def test_denoiser(exported, goldens):
    """No library ships this class, so the reference here loads it; `--dtype` is of this component alone."""
    options, place = exported
    tensors = folder.open_component(place / "transformer")
    original = folder.open_component(goldens / "tiny_release" / "transformer")
    config = denoiser.read_config(place / "transformer" / "config.json")
    half = "bf16" in options
    model = load_release(TorchDenoiser(config).to(torch.bfloat16 if half else torch.float32), tensors)
    for name, tensor in model.state_dict().items():
        expected = torch.from_numpy(np.array(original[name]))
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
        assert tensors.dtype(name) == np.dtype(jnp.bfloat16 if half else np.float32)


def test_shards(exported, answers, tmp_path):
    """The same weights in several files with an index, as the released size has them, are found by both libraries."""
    _, place = exported
    for component, stem, load, check in (
        ("vae", "diffusion_pytorch_model", load_vae, check_vae),
        ("text_encoder", "model", load_text_encoder, check_text_encoder),
    ):
        tensors = folder.open_component(place / component)
        names = writer.write_folder(tmp_path / component, tensors, stem=stem, max_shard_bytes=200_000)
        assert len(names) > 3
        (tmp_path / component / "config.json").write_text((place / component / "config.json").read_text())
        check(load(tmp_path / component), answers)


def test_training_run(tiny_config, tmp_path):
    """What a run exports gives in PyTorch what its own parameters give here."""
    quiet = dataclasses.replace(tiny_config.samples, every=0)
    config = dataclasses.replace(tiny_config, out=str(tmp_path / "run"), steps=2, samples=quiet)
    state = train(config).state
    run("convert", "to-torch", tmp_path / "run", tmp_path / "theirs")
    place = tmp_path / "theirs" / "transformer"
    model = load_release(TorchDenoiser(denoiser.read_config(place / "config.json")), folder.open_component(place))
    values = json.loads((place / "config.json").read_text())
    assert values["_class_name"] == "LensTransformer2DModel"
    c, rng = config.model, np.random.default_rng(0)
    latents = rng.standard_normal((2, 12, c.latent_channels), np.float32)
    text = rng.standard_normal((2, 5, c.text_width), np.float32)
    t, lengths = np.array([0.3, 0.9], np.float32), np.array([5, 2], np.int32)
    expected = apply(c, state.ema["denoiser"], latents, (text,), lengths, t, joint_positions(3, 4, 5))
    with torch.no_grad():
        mask = torch.arange(5) < torch.from_numpy(lengths)[:, None]
        actual = model(torch.from_numpy(latents), [torch.from_numpy(text)], torch.from_numpy(t), (3, 4), mask)
    assert np.abs(expected).max() > 0
    # The way out starts at zero, so after few steps the output is small and its error relatively larger.
    assert relative_error(actual, expected) <= 2e-5
