"""bfloat16 from tokens to bytes: ours is no farther from float32 than the release's own arithmetic is."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline, compute_empirical_mu
from transformers import GptOssForCausalLM, Mxfp4Config

from lens_jax.bench.distance import relative_distance
from lens_jax.bench.torch_denoiser import TorchDenoiser, load_release
from lens_jax.convert import denoiser
from lens_jax.convert.folder import open_component
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.encoders.gpt_oss import encode_tokens
from lens_jax.encoders.text import TextFeatures
from lens_jax.inference.pipeline import LensPipeline

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def release(goldens):
    return goldens / "tiny_release"


@pytest.fixture(scope="module")
def golden(release):
    return SafetensorsFile(release / "golden_io.safetensors")


def draw_as_the_release(release, golden, dtype) -> dict[str, np.ndarray]:
    """The release's pipeline with its roundings (release 3.1, 3.5 to 3.8), out of its own libraries' parts."""
    ids, mask = (torch.from_numpy(np.array(golden[name])).long() for name in ("input_ids", "attention_mask"))
    drop, steps, scale = (golden[name].item() for name in ("text_offset", "num_steps", "guidance_scale"))
    grid = tuple(int(n) for n in golden["latent_hw"])

    encoder = GptOssForCausalLM.from_pretrained(
        release / "text_encoder", dtype=dtype, attn_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
    ).eval()  # fmt: skip
    config = denoiser.read_config(release / "transformer" / "config.json")
    model = load_release(TorchDenoiser(config).to(dtype), open_component(release / "transformer")).eval()
    vae = AutoencoderKLFlux2.from_pretrained(release / "vae", torch_dtype=dtype).eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(release / "scheduler")

    layers = []
    for i in (1, 2, 4, 5):
        encoder.model.layers[i].register_forward_hook(lambda *call: layers.append(call[-1]))
    encoder(ids, attention_mask=mask)
    text, mask = [layer[:, drop:] for layer in layers], mask[:, drop:].bool()
    features = [layer[mask].float().numpy() for layer in text]

    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=compute_empirical_mu(grid[0] * grid[1], steps))
    x = torch.from_numpy(np.array(golden["initial_latents"])).to(dtype)
    twice = lambda parts: torch.cat(parts)
    for time in scheduler.timesteps:
        t = time.expand(2 * len(x)).to(dtype) / 1000
        both = [twice([layer, torch.zeros_like(layer)]) for layer in text]
        conditional, unconditional = model(twice([x, x]), both, t, grid, twice([mask, mask & False])).chunk(2)
        combined = unconditional + scale * (conditional - unconditional)
        norm = lambda v: torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        velocity = combined * (norm(conditional) / norm(combined).clamp_min(1e-12))
        x = scheduler.step(velocity, time, x, return_dict=False)[0]

    packed = x.transpose(1, 2).unflatten(2, grid)
    inverse = (1 / torch.sqrt(vae.bn.running_var + vae.bn.eps)).to(dtype)[:, None, None]
    shift = (-vae.bn.running_mean).to(dtype)[:, None, None]
    image = vae.decode(Flux2Pipeline._unpatchify_latents(packed / inverse - shift)).sample
    images = ((image.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1)
    return {"text": np.concatenate(features), "latents": x.float().numpy(), "images": images.numpy()}


def draw_as_we_do(release, golden, dtype) -> dict[str, np.ndarray]:
    pipe = LensPipeline.from_pretrained(release, dtype=dtype)
    encoder, drop = pipe.text_encoder, int(golden["text_offset"])
    lengths = np.asarray(golden["attention_mask"].sum(1))
    layers = encode_tokens(
        encoder.config.model, encoder.model, golden["input_ids"], lengths, encoder.config.selected, drop=drop
    )
    grid = tuple(int(n) for n in golden["latent_hw"])
    steps = int(golden["num_steps"]), float(golden["guidance_scale"])
    features = TextFeatures(tuple(layers), lengths - drop)
    latents = pipe.denoise(golden["initial_latents"], features, None, grid, *steps)
    rows = [np.asarray(layer, np.float32)[i, :n] for layer in layers for i, n in enumerate(features.lengths)]
    return {"text": np.concatenate(rows), "latents": latents, "images": pipe.decode(latents, grid, "pil")}


def test_no_farther_from_float32_than_the_release(release, golden):
    with torch.no_grad():
        exact = draw_as_the_release(release, golden, torch.float32)
        theirs = draw_as_the_release(release, golden, torch.bfloat16)
    ours = draw_as_we_do(release, golden, "bfloat16")
    # The stand-in for the release is the release: in float32 it ends where the golden does.
    assert relative_distance(exact["latents"], golden["final_latents"]) <= 2e-5
    distances = {}
    for name, result in (("release", theirs), ("ours", ours)):
        off = np.abs(result["images"].astype(int) - exact["images"])
        shares = [float((off > level).mean()) for level in (1, 2, 4)]
        distances[name] = [relative_distance(result[key], exact[key]) for key in ("text", "latents")] + shares
        print(f"{name}: text, latents, bytes off by > 1, 2, 4:", ", ".join(f"{v:.2g}" for v in distances[name]))
    for mine, other in zip(distances["ours"], distances["release"]):
        assert mine <= other
