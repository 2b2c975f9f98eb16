"""Devices that are not there, where they would stand: TPUs in the torus of their slice, GPUs in their nodes.

To compile for a slice takes libtpu, the TPU's own compiler, which does so on any machine. Where the chips are is simple
enough to be said without it: once loaded, it ends the process in which JAX's profiler is started.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from lens_jax import parallel
from lens_jax.errors import LensError
from lens_jax.parallel import MeshConfig
from lens_jax.planning.hardware import HARDWARE, Name

# Slices that can be rented, by their chips (cloud.google.com/tpu/docs/v5e, v5p, v6e): squares and halves of squares, or
# a few small ones and every cuboid of 4 x 4 x 4 cubes up to 16 x 16 x 24 chips (v4: 12 x 16 x 16).
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_SMALL = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}


def _cuboids(*most: int) -> dict[int, tuple[int, ...]]:
    """Sides by number of chips, of several cuboids the most like a cube."""
    found = dict(_SMALL)
    for sides in sorted(itertools.product(*(range(4, side + 1, 4) for side in most)), key=sum):
        if sides == tuple(sorted(sides)):
            found.setdefault(math.prod(sides), sides)
    return found


_SLICES: dict[Name, dict[int, tuple[int, ...]]] = {
    "v5e": _FLAT, "v6e": _FLAT, "v5p": _cuboids(16, 16, 24), "v4": _cuboids(12, 16, 16),
}  # fmt: skip
# As JAX calls them.
_KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
# A v4 would be compiled for as two small devices a chip, not as one.
_COMPILED = ("v5e", "v5p", "v6e")
# Chips of a host along the sides of its slice, where these are as long.
_HOST = (2, 2, 1)
# libtpu looks for the machine it is on and complains for pages where there is none; and two plans may run at once.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """As much of a GPU as decides its place in a mesh."""

    id: int
    # The node, whose GPUs one process drives.
    process_index: int
    platform: str = "gpu"


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU."""

    id: int
    # The host, with four chips and one process.
    process_index: int
    coords: tuple[int, int, int]
    slice_index: int
    device_kind: str
    core_on_chip: int = 0
    platform: str = "tpu"


def check(config: MeshConfig, devices: list[Any], batch_sizes: list[int]) -> str:
    """How the mesh of a run lies on devices that `describe` gave, in a line; LensError where it does not."""
    if len(devices) == 1:
        return ""
    layout = parallel.arrange(config.sizes(len(devices)), devices)
    mesh = parallel.make_mesh(config, devices)
    hosts = sorted({device.process_index for device in devices})
    share = 0.0
    for size in batch_sizes:
        read = [parallel.rows_of_host(mesh, size, host) for host in hosts]
        share = max(map(len, read)) / size
        assert np.array_equal(np.unique(np.concatenate(read)), np.arange(size))
    if len(hosts) == 1:
        return f"one host, {layout.how}" if layout.how else ""
    return f"{len(hosts)} hosts, {layout.how}; a host reads {100 * share:.3g} % of the rows"


def describe(hardware: Name, devices: int, slices: int = 1) -> list[Any]:
    """So many devices as JAX would list them; LensError where that many cannot be rented."""
    if HARDWARE[hardware].platform != "tpu":
        if slices != 1:
            raise LensError(f"--slices is {slices}; it must be 1 for {hardware}, which come in nodes")
        return [Gpu(number, number // HARDWARE[hardware].domain) for number in range(devices)]
    shape = (*sides(hardware, devices, slices), 1)[:3]
    hosts = [max(1, side // chips) for side, chips in zip(shape, _HOST)]
    found = []
    # Chips and hosts are numbered along the first side first.
    for index, z, y, x in itertools.product(range(slices), *(range(side) for side in reversed(shape))):
        host = x // _HOST[0] + hosts[0] * (y // _HOST[1] + hosts[1] * (z + hosts[2] * index))
        found.append(Chip(len(found), host, (x, y, z), index, _KINDS[hardware]))
    return found


def sides(hardware: Name, devices: int, slices: int = 1) -> tuple[int, ...]:
    """The sides of each of the slices that have so many chips together; LensError with the nearest that exist."""
    known = sorted(_SLICES[hardware])
    chips, over = divmod(devices, max(slices, 1))
    if slices < 1 or over:
        raise LensError(f"--slices is {slices}; it must be at least 1 and divide the {devices} devices")
    if chips not in known:
        near = [max((n for n in known if n < chips), default=0), min((n for n in known if n > chips), default=0)]
        exist = " and ".join(f"{number:,}" for number in near if number)
        several = "" if near[1] else ", and several slices (--slices)"
        each = f" in each of {slices} slices" if slices > 1 else ""
        raise LensError(
            f"--devices {devices}: no slice of {hardware} has {chips:,} chips{each}; there are some of {exist}{several}"
        )
    return _SLICES[hardware][chips]


def slice_mesh(config: MeshConfig, hardware: Name, devices: int, slices: int = 1) -> Mesh:
    """The mesh of a run over TPUs that can be compiled for, of one too; LensError where that cannot be."""
    if hardware not in _COMPILED:
        raise LensError(f"--compile: {hardware} cannot be compiled for without one; {', '.join(_COMPILED)} can")
    if importlib.util.find_spec("libtpu") is None:
        raise LensError("--compile needs the TPU's compiler: pip install 'lens-jax[tpu]'")
    return parallel.make_mesh(config, described_by_libtpu(hardware, sides(hardware, devices, slices), slices))


def described_by_libtpu(hardware: Name, shape: tuple[int, ...], slices: int) -> list[Any]:
    """Devices that can be compiled for."""
    name = f"{hardware}:{'x'.join(map(str, shape))}"
    host = [min(pair) for pair in zip((*shape, 1), _HOST)]
    several = {"num_slices": slices} if slices > 1 else {}
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        return topologies.get_topology_desc(name, platform="tpu", chips_per_host_bounds=host, **several).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise LensError(f"libtpu describes no slice {name}: {str(error).splitlines()[0]}") from None
