"""Folders of tiny networks that score images, laid out as the hub has the released ones, and images for them.

Weights are drawn by the names of tensors, so they are the same wherever they are made; `tests/goldens/vision.json` has
what transformers makes of them (`tests/oracle/test_vision.py`).
"""

import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from lens_jax.convert import vit as convert
from lens_jax.convert import writer
from lens_jax.data.engine.scorers import aesthetic

# As in the released ones the image is no multiple of the patch, but for the classifier.
SIZES = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
}  # fmt: skip
CONFIGS = {
    "embedding": {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 12, "text_config": {},
        "vision_config": {
            **SIZES, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 14, "projection_dim": 12,
        },
    },
    "aesthetic": {
        "architectures": ["SiglipModel"], "model_type": "siglip", "text_config": {},
        "vision_config": {**SIZES, "model_type": "siglip_vision_model", "image_size": 34, "patch_size": 8},
    },
    "watermark": {
        "architectures": ["SiglipForImageClassification"], "model_type": "siglip",
        "id2label": {"0": "No Watermark", "1": "Watermark"},
        "vision_config": {**SIZES, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 16},
    },
}  # fmt: skip
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "SiglipImageProcessor"}
PREPROCESSORS = {
    # In the form of CLIP's release, of before transformers had sizes by name.
    "embedding": {
        "crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 32,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "aesthetic": {**_HALF, "do_convert_rgb": None, "resample": 3, "size": {"height": 34, "width": 34}},
    "watermark": {**_HALF, "rescale_factor": 0.00392156862745098, "resample": 2, "size": {"height": 32, "width": 32}},
}  # fmt: skip
POOLS = {"embedding": "class", "aesthetic": "attention", "watermark": "mean"}
# What the released files hold besides, and nothing of ours reads.
BESIDES = {
    "embedding": {"logit_scale": (), "text_projection.weight": (12, 8), "text_model.final_layer_norm.weight": (8,)},
    "aesthetic": {"logit_scale": (1,), "logit_bias": (1,), "text_model.head.bias": (8,)},
    "watermark": {"vision_model.head.probe": (1, 1, 24), "vision_model.head.mlp.fc1.bias": (40,)},
}


def config_of(field: str):
    """The config of the network that a field of Models names, in float32."""
    return convert.config_from_release(CONFIGS[field], "config.json", POOLS[field], dtype="float32")


def tensors_of(field: str) -> dict[str, np.ndarray]:
    """Its tensors by their names in the release, float32."""
    tensors = {rule.name: draw(rule.name, rule.shape) for rule in convert.rules(config_of(field))}
    return tensors | {name: draw(name, shape) for name, shape in BESIDES[field].items()}


def head() -> dict[str, np.ndarray]:
    """The tensors of the aesthetic predictor's head: scores of around 5."""
    sizes = (SIZES["hidden_size"], 1024, 128, 64, 16, 1)
    shapes = {f"scoring_head.{2 * i}": (sizes[i + 1], sizes[i]) for i in range(5)}
    found = {}
    for name, shape in shapes.items():
        found |= {f"{name}.weight": draw(f"{name}.weight", shape), f"{name}.bias": draw(f"{name}.bias", shape[:1])}
    # Features at unit length are small, and images are to differ.
    found["scoring_head.0.weight"] *= 10
    found["scoring_head.8.bias"] += 5
    return found


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random weights by their name: of kernels a variance of one over the inputs, scales around 1."""
    noise = np.asarray(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape))
    if len(shape) > 1 and "embedding.weight" not in name.replace("patch_embedding", ""):
        noise *= np.prod(shape[1:]) ** -0.5
    elif name.endswith("weight") and len(shape) == 1:
        noise = 1 + 0.2 * noise
    else:
        noise *= 0.2
    return noise.astype(np.float32)


def write(folder: Path, field: str) -> Path:
    """A folder with the network of a field of Models."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[field]))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSORS[field]))
    writer.write_file(folder / "model.safetensors", tensors_of(field))
    if field == "aesthetic":
        writer.write_file(folder / aesthetic.HEAD, head())
    return folder


def images(sizes=((61, 47), (90, 33), (35, 200), (20, 23), (32, 32), (17, 120))) -> list[np.ndarray]:
    """uint8 [H, W, 3] of such (width, height): smooth, with hard edges."""
    found = []
    for seed, size in enumerate(sizes):
        rng = np.random.default_rng(seed)
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
        pixels = np.array(small.resize(size, Image.Resampling.BICUBIC))
        pixels[: size[1] // 3, : size[0] // 2] = rng.integers(0, 256, 3)
        found.append(pixels)
    return found
