"""Run by a test in a process of its own, on eight simulated devices.

python frozen_on_meshes.py CONFIG.json MESH ...   prints for each mesh "data,fsdp,tensor,sequence" how far latents and
features are from those of one device, as one JSON line.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402

from lens_jax import config as config_files  # noqa: E402
from lens_jax import parallel  # noqa: E402
from lens_jax.data.buckets import Bucket  # noqa: E402
from lens_jax.data.mixture import Shape  # noqa: E402
from lens_jax.parallel import MeshConfig  # noqa: E402
from lens_jax.pretraining.config import TrainConfig  # noqa: E402
from lens_jax.pretraining.features import Features  # noqa: E402

BUCKET = Bucket(64, 64)
CAPTIONS = [
    "a red apple", "", "two cats on a sofa", "ein roter Apfel", "a house, a tree, the sea", "x", "", "a blue car",
]  # fmt: skip


def encoded(config, mesh, sample: bool) -> dict:
    config = dataclasses.replace(config, codec=dataclasses.replace(config.codec, sample=sample))
    features = Features(config, [Shape(BUCKET)], mesh)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    batch = {"captions": CAPTIONS, "bucket": (64, 64), "text_class": 0, "step": 3, "pixels": pixels}
    batch = jax.device_get(features.encode({}, features.read(batch)))
    prompts = features.prompts(CAPTIONS[:3])
    return {
        "latents": batch["latents"],
        **{f"text_{i}": layer for i, layer in enumerate(batch["text"])},
        **{f"prompts_{i}": layer for i, layer in enumerate(prompts.layers)},
    }


def main() -> None:
    path, *meshes = sys.argv[1:]
    config = config_files.from_dict(TrainConfig, json.loads(Path(path).read_text()), path)
    expected = {sample: encoded(config, None, sample) for sample in (False, True)}
    assert np.abs(expected[True]["latents"] - expected[False]["latents"]).max() > 0
    for name in meshes:
        mesh = parallel.make_mesh(MeshConfig(*map(int, name.split(","))))
        errors = {}
        for sample, wanted in expected.items():
            actual = encoded(config, mesh, sample)
            for key, value in wanted.items():
                errors[f"{key}, sample {sample}"] = float(np.linalg.norm(actual[key] - value) / np.linalg.norm(value))
        print(json.dumps({"mesh": name, "errors": errors}), flush=True)


if __name__ == "__main__":
    main()
