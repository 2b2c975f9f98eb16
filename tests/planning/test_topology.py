"""Slices of TPUs that are not there, and what their compiler says of the programs of a run."""

import importlib.util
import json
import subprocess
import sys
import types

import jax
import pytest

from lens_jax import cli
from lens_jax.errors import LensError
from lens_jax.parallel import MeshConfig
from lens_jax.planning import lowering, topology

QUICKSTART = (
    "plan", "quickstart", "--data.path", "nowhere", "--data.buckets", "24x24", "--hardware",
)  # fmt: skip


def test_slices_are_those_that_can_be_rented():
    assert [topology.sides("v6e", count) for count in (1, 8, 16, 256)] == [(1, 1), (2, 4), (4, 4), (16, 16)]
    shapes = {8: (2, 2, 2), 16: (2, 2, 4), 256: (4, 8, 8), 192: (4, 4, 12), 6144: (16, 16, 24)}
    assert {count: topology.sides("v5p", count) for count in shapes} == shapes
    assert topology.sides("v6e", 512, slices=2) == (16, 16)
    assert max(topology._SLICES["v4"]) == 3072


@pytest.mark.parametrize(
    ("hardware", "devices", "slices", "message"),
    [
        ("v6e", 24, 1, "--devices 24: no slice of v6e has 24 chips; there are some of 16 and 32"),
        ("v5p", 1, 1, "no slice of v5p has 1 chips; there are some of 4"),
        ("v5e", 512, 1, r"no slice of v5e has 512 chips; there are some of 256, and several slices \(--slices\)"),
        ("v5e", 48, 2, "no slice of v5e has 24 chips in each of 2 slices; there are some of 16 and 32"),
        ("v5e", 16, 3, "--slices is 3; it must be at least 1 and divide the 16 devices"),
        ("h100", 16, 2, "--slices is 2; it must be 1 for h100, which come in nodes"),
    ],
)
def test_what_cannot_be_rented(hardware, devices, slices, message):
    with pytest.raises(LensError, match=message):
        topology.describe(hardware, devices, slices)


def test_how_a_mesh_lies_on_the_devices():
    def check(hardware, devices, slices=1, **mesh):
        return topology.check(MeshConfig(**mesh), topology.describe(hardware, devices, slices), [devices])

    assert check("h100", 8) == ""
    assert check("h100", 32, data=4) == "4 hosts, 4 nodes in order; a host reads 25 % of the rows"
    assert check("v4", 4096 // 16) == "64 hosts, along the 4x8x8 torus; a host reads 1.56 % of the rows"
    assert check("v6e", 16) == "4 hosts, along the 4x4 torus; a host reads 25 % of the rows"
    # The two hosts along `tensor` read the same half.
    assert check("v6e", 16, tensor=4).endswith("a host reads 50 % of the rows")
    joined = "2 slices along data 2, each along parts of the 16x16 torus"
    assert joined in check("v6e", 512, 2, data=-1, fsdp=64)
    with pytest.raises(LensError, match=r"tensor 64 x sequence 1 must divide the 16 chips of each of the 4 slices"):
        check("v6e", 64, 4, tensor=64)


# In a process of its own, where nothing else is done.
LIBTPU = """
import json, sys, jax
jax.config.update("jax_platforms", "cpu")
from lens_jax.planning import topology
for hardware, chips, slices in json.loads(sys.argv[1]):
    devices = topology.described_by_libtpu(hardware, topology.sides(hardware, chips * slices, slices), slices)
    print(json.dumps([
        [chip.process_index, chip.coords, getattr(chip, "slice_index", 0), chip.device_kind]
        + [chip.core_on_chip, chip.platform]
        for chip in sorted(devices, key=lambda chip: chip.id)
    ]))
"""


def test_chips_are_where_libtpu_says():
    pytest.importorskip("libtpu", reason="for Linux the extra `test` brings it")
    kinds = (("v5e", 1, 4, 8, 16, 32, 64, 128, 256), ("v6e", 8, 16, 256), ("v5p", 4, 8, 16, 32, 64, 128, 192, 1024))
    wanted = [(hardware, chips, slices) for hardware, *many in kinds for chips in many for slices in (1, 2)]
    done = subprocess.run(
        [sys.executable, "-c", LIBTPU, json.dumps(wanted)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for (hardware, chips, slices), line in zip(wanted, done.stdout.splitlines(), strict=True):
        found = [
            [
                chip.process_index,
                list(chip.coords),
                chip.slice_index,
                chip.device_kind,
                chip.core_on_chip,
                chip.platform,
            ]
            for chip in topology.describe(hardware, chips * slices, slices)
        ]
        assert found == json.loads(line), (hardware, chips, slices)


def test_what_cannot_be_compiled_for(monkeypatch):
    with pytest.raises(LensError, match="h100 cannot be compiled for without one; v5e, v5p, v6e can"):
        topology.slice_mesh(MeshConfig(), "h100", 8)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LensError, match="the TPU's compiler: pip install 'lens-jax"):
        topology.slice_mesh(MeshConfig(), "v5e", 8)


def _refused(message: str) -> types.SimpleNamespace:
    def compile():
        raise jax.errors.JaxRuntimeError(message)

    return types.SimpleNamespace(compile=compile)


def test_what_does_not_fit_still_has_a_size():
    """The message is libtpu 0.0.42's of a program too large for a v5p."""
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (111.50G) exceeds "
        "available HBM (95.74G)."
    )
    assert lowering._compiled_bytes("micro-step", _refused(message)) == round(111.5 * 2**30)
    with pytest.raises(LensError, match=r"^micro-step: the compiler says: INTERNAL: no$"):
        lowering._compiled_bytes("micro-step", _refused("INTERNAL: no\nmore"))


@pytest.mark.oracle
@pytest.mark.parametrize(("hardware", "devices", "images"), [("v5e", "8", "512"), ("v6e", "1", "64")])
def test_estimate_beside_the_compiler(tmp_path, hardware, devices, images):
    """The TPU's compiler takes the whole step, with the splash kernel, on a mesh and on one device.

    64 images a device, since fewer would stay in a core's own memory, of which the estimate knows nothing.
    """
    programs = []
    for more in ((), ("--compile",)):
        path = tmp_path / "plan.json"
        with pytest.raises(SystemExit) as stop:
            cli.main(
                [*QUICKSTART, hardware, "--devices", devices, "--data.batch-size", images, "--json", str(path), *more]
            )
        assert not stop.value.code
        programs.append(json.loads(path.read_text())["programs"])
    estimated, compiled = programs
    assert list(compiled[0]["bytes"]) == ["as compiled"]
    assert compiled[0]["kernel"] == "splash"
    assert 0.5 < sum(estimated[0]["bytes"].values()) / compiled[0]["bytes"]["as compiled"] < 2
