"""bfloat16 from tokens to bytes: ours is no farther from float32 than the release's own arithmetic is."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")
import torch

from lens_jax.bench.distance import relative_distance
from lens_jax.convert.safetensors import SafetensorsFile

_spec = importlib.util.spec_from_file_location("original", Path(__file__).with_name("original.py"))
original = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(original)

pytestmark = pytest.mark.oracle


def test_no_farther_from_float32_than_the_release(goldens):
    release = goldens / "tiny_release"
    golden = SafetensorsFile(release / "golden_io.safetensors")
    request = original.Request(
        golden["input_ids"], golden["attention_mask"], int(golden["text_offset"]), golden["initial_latents"],
        tuple(int(n) for n in golden["latent_hw"]), int(golden["num_steps"]), float(golden["guidance_scale"]),
    )  # fmt: skip
    exact = original.draw_as_the_release(release, request)
    theirs = original.draw_as_the_release(release, request, torch.bfloat16)
    ours = original.draw_as_we_do(release, request, "bfloat16")
    # The stand-in for the release is the release: in float32 it ends where the golden does.
    assert relative_distance(exact["latents"], golden["final_latents"]) <= 2e-5
    distances = {}
    for name, result in (("release", theirs), ("ours", ours)):
        off = abs(result["images"].astype(int) - exact["images"])
        shares = [float((off > level).mean()) for level in (1, 2, 4)]
        distances[name] = [relative_distance(result[key], exact[key]) for key in ("text", "latents")] + shares
        print(f"{name}: text, latents, bytes off by > 1, 2, 4:", ", ".join(f"{v:.2g}" for v in distances[name]))
    for mine, other in zip(distances["ours"], distances["release"]):
        assert mine <= other
