"""Slices of TPUs that are not there, and what their compiler says of the programs of a run."""

import importlib.util
import json
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


@pytest.mark.parametrize(
    ("devices", "square", "cube"),
    [(1, (1, 1), (1, 1, 1)), (8, (2, 4), (2, 2, 2)), (16, (4, 4), (2, 2, 4)), (256, (16, 16), (4, 8, 8))],
)
def test_slices_are_compact(devices, square, cube):
    assert (topology._layout(devices, 2), topology._layout(devices, 3)) == (square, cube)


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
