"""The release's pipeline with its roundings (release 3.1, 3.5 to 3.8), out of its own libraries' parts."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline, compute_empirical_mu
from transformers import GptOssForCausalLM, Mxfp4Config

from lens_jax.bench.torch_denoiser import TorchDenoiser, load_release
from lens_jax.convert import denoiser
from lens_jax.convert.folder import open_component
from lens_jax.encoders.gpt_oss import encode_tokens
from lens_jax.encoders.text import TextFeatures
from lens_jax.inference.pipeline import LensPipeline


class Request(NamedTuple):
    """What is drawn: token ids [B, T] with their mask, of which the first `drop` are left out, and how."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    drop: int
    # [B, rows * columns, channels]
    noise: np.ndarray
    grid: tuple[int, int]
    steps: int
    guidance_scale: float


@torch.no_grad()
def draw_as_the_release(release: Path, request: Request, dtype=torch.float32) -> dict[str, np.ndarray]:
    """`text` features of real tokens, final `latents` and `images` uint8, all computed in `dtype`."""
    ids, mask = (torch.from_numpy(np.array(x)).long() for x in (request.input_ids, request.attention_mask))
    drop, grid, steps, scale = request.drop, request.grid, request.steps, request.guidance_scale
    values = json.loads((release / "text_encoder" / "config.json").read_text())
    packed = {"quantization_config": Mxfp4Config(dequantize=True)} if "quantization_config" in values else {}
    encoder = GptOssForCausalLM.from_pretrained(
        release / "text_encoder", dtype=dtype, attn_implementation="eager", **packed
    ).eval()
    config = denoiser.read_config(release / "transformer" / "config.json")
    model = load_release(TorchDenoiser(config).to(dtype), open_component(release / "transformer")).eval()
    vae = AutoencoderKLFlux2.from_pretrained(release / "vae", torch_dtype=dtype).eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(release / "scheduler")

    layers = []
    for i in json.loads((release / "transformer" / "config.json").read_text())["selected_layer_index"]:
        encoder.model.layers[i].register_forward_hook(lambda *call: layers.append(call[-1]))
    encoder(ids, attention_mask=mask)
    text, mask = [layer[:, drop:] for layer in layers], mask[:, drop:].bool()
    features = [layer[mask].float().numpy() for layer in text]

    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=compute_empirical_mu(grid[0] * grid[1], steps))
    x = torch.from_numpy(np.array(request.noise)).to(dtype)
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


def draw_as_we_do(release: Path, request: Request, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The same by a LensPipeline."""
    pipe = LensPipeline.from_pretrained(release, dtype=dtype)
    encoder, drop = pipe.text_encoder, request.drop
    lengths = np.asarray(request.attention_mask.sum(1))
    layers = encode_tokens(
        encoder.config.model, encoder.model, request.input_ids, lengths, encoder.config.selected, drop=drop
    )
    features = TextFeatures(tuple(layers), lengths - drop)
    latents = pipe.denoise(request.noise, features, None, request.grid, request.steps, request.guidance_scale)
    rows = [np.asarray(layer, np.float32)[i, :n] for layer in layers for i, n in enumerate(features.lengths)]
    return {"text": np.concatenate(rows), "latents": latents, "images": pipe.decode(latents, request.grid, "pil")}
