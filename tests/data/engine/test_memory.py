"""A worker holds as much after its last unit as after its first ones."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from lens_jax.data.engine.config import EngineConfig, Source
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.measure import Measure
from lens_jax.data.engine.probe import Probe
from lens_jax.data.engine.run_stage import read_log, run_stage
from lens_jax.data.engine.stage import fingerprints
from lens_jax.data.engine.supervisor import Options
from lens_jax.data.engine.units import find_units

TARS, IMAGES = 40, 500


@pytest.mark.slow
def test_memory_does_not_grow_with_the_run(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(file, "JPEG")
    (tmp_path / "tars").mkdir()
    for number in range(TARS):
        with tarfile.open(tmp_path / "tars" / f"{number:05d}.tar", "w") as tar:
            for i in range(IMAGES):
                data = file.getvalue() + b"%d %d" % (number, i)  # behind the end of the image
                entry = tarfile.TarInfo(f"{i:05d}.jpg")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    config = EngineConfig((Source("s", "webdataset", str(tmp_path / "tars")),), work=str(tmp_path / "work"))
    stages = {"probe": Probe(), "measure": Measure()}
    layout = Layout(tmp_path / "work", fingerprints(stages, config))
    units = find_units(config)
    for name, stage in stages.items():
        run_stage(stage, config, layout, units, Options(workers=1, accept_losses=True), show=False)
        log = sorted(read_log(layout, name).values(), key=lambda entry: entry["time"])
        used = [entry["memory"] >> 20 for entry in log]
        # Allocators take a while to settle; 40 times what they take at first would be hundreds of MB.
        assert max(used[10:]) - min(used[10:]) < 25, f"{name}: MiB after each unit: {used}"
