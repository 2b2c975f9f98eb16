"""Drawing on meshes: the images of one device, and on no device all of the parameters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# The largest share of the parameters that a device may hold: modulation, a quarter of them, is not sharded over tensor.
MESHES = {"2,2,2,1": 0.4}
MORE_MESHES = {"1,8,1,1": 0.14, "1,2,2,2": 0.4, "8,1,1,1": 1.0, "1,4,2,1": 0.2}


@pytest.mark.slow
@pytest.mark.parametrize("meshes", [MESHES, MORE_MESHES], ids=str)
def test_on_meshes(meshes):
    script = Path(__file__).with_name("draw_on_meshes.py")
    done = subprocess.run([sys.executable, str(script), *meshes], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {line["mesh"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == meshes.keys()
    for name, share in meshes.items():
        # Sums in another order.
        assert found[name]["error"] <= 1e-5
        assert found[name]["held"] <= share
        # A block, which is a sixteenth, and activations: not the whole tree gathered.
        assert found[name]["needed"] <= 0.15
