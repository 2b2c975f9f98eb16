"""Planned traffic beside the collectives of the compiled step, and the time of rings worked out by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lens_jax.planning.communication import Collective
from lens_jax.planning.hardware import HARDWARE


@pytest.mark.slow
@pytest.mark.parametrize("meshes", [("2,2,2,1",), ("8,1,1,1", "1,8,1,1")])
def test_bytes_are_those_of_the_compiled_step(meshes):
    """On eight simulated devices, every kind of collective, those in loops as often as they run. With a tensor axis XLA
    sums some numbers of the gradient's norm in one more step: 0.2 %."""
    script = Path(__file__).with_name("traffic_on_meshes.py")
    command = [sys.executable, str(script), *meshes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["mesh"] for one in found] == list(meshes)
    for one in found:
        assert sum(one["planned"].values()) > 1e6
        assert one["planned"] == pytest.approx(one["compiled"], rel=2e-3)


MESH = {"data": 4, "fsdp": 16, "tensor": 1, "sequence": 1}


@pytest.mark.parametrize(
    ("kind", "axes", "sent", "seconds"),
    [
        # Sixteen devices on two nodes of eight: NVLink carries 15/16, eight network cards half of it.
        ("all-gather", ("fsdp",), 15 / 16, max(15 / 16 / 450, 1 / 2 / (8 * 50))),
        # Four copies on four nodes: a network card each.
        ("all-reduce", ("data",), 2 * 3 / 4, 2 * 3 / 4 / 50),
        # All 64 on eight nodes.
        ("all-reduce", ("data", "fsdp"), 2 * 63 / 64, max(2 * 63 / 64 / 450, 2 * 7 / 8 / (8 * 50))),
        # Half of what a device exchanges goes to the other node through its own card.
        ("all-to-all", ("fsdp",), 15 / 16, 1 / 2 / 50),
    ],
)
def test_ring(kind, axes, sent, seconds):
    one = Collective(kind, axes, 10**9, "weights", times=3)
    assert one.sent(MESH) == pytest.approx(3e9 * sent, rel=1e-9)
    assert one.seconds(MESH, HARDWARE["h100"]) == pytest.approx(3 * seconds, rel=1e-9)


def test_a_pod_of_tpus_is_one_network():
    one = Collective("all-gather", ("fsdp",), 10**9, "weights")
    assert one.seconds(MESH, HARDWARE["v5p"]) == pytest.approx(15 / 16 / 600, rel=1e-9)
