"""Eight simulated devices draw the images of one device and make its update."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_update_is_that_of_one_device(algorithm):
    """Sums in another order; the rewards are the same, or the update would be another one altogether."""
    script = Path(__file__).with_name("rl_on_meshes.py")
    command = [sys.executable, str(script), algorithm, "8,1,1,1", "2,2,2,1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["mesh"] for line in lines] == ["8,1,1,1", "2,2,2,1"]
    for line in lines:
        assert max(line["errors"].values()) <= 1e-5, line
