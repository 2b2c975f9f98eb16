"""Run by a test in a process of its own, on three simulated devices.

python scores_on_devices.py FOLDER COUNT   prints, as one JSON line by field, the scores of the first COUNT images by
the tiny networks in FOLDER.
"""

import json
import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 3)

import numpy as np  # noqa: E402
import tiny_networks  # noqa: E402

from lens_jax.data.engine.scorers import aesthetic, clip, watermark  # noqa: E402


def main(folder: str, count: str) -> None:
    images = tiny_networks.images()[: int(count)]
    found = {}
    for field, module in (("embedding", clip), ("aesthetic", aesthetic), ("watermark", watermark)):
        scorer = module.load(f"{folder}/{field}", "float32")
        found[field] = scorer.score(np.stack([scorer.prepare(image) for image in images]))[field].tolist()
    print(json.dumps(found))


if __name__ == "__main__":
    assert jax.device_count() == 3
    main(*sys.argv[1:])
