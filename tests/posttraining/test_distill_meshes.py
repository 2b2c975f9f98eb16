"""Eight simulated devices make the updates of one device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_updates_are_those_of_one_device(kind):
    """Sums in another order; what is drawn at random is the same."""
    script = Path(__file__).with_name("distill_on_meshes.py")
    command = [sys.executable, str(script), kind, "8,1,1,1", "2,2,2,1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["mesh"] for line in lines] == ["8,1,1,1", "2,2,2,1"]
    for line in lines:
        assert max(line["errors"].values()) <= 1e-5, line
