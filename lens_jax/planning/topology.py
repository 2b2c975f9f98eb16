"""Devices that are not there, where they would stand: slices of TPUs as libtpu describes them, GPUs in their nodes.

libtpu, the TPU's own compiler, needs no TPU: it compiles for any slice on any machine.
"""

import dataclasses
import functools
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
# A v4 would be compiled for as two small devices a chip, not as one.
_DESCRIBED = ("v5e", "v5p", "v6e")
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


def check(config: MeshConfig, hardware: Name, devices: list[Any] | None, batch_sizes: list[int]) -> str:
    """How the mesh of a run lies on devices that `describe` gave, in a line; LensError where it does not."""
    if devices is None:
        change = "pip install 'lens-jax[tpu]' checks it" if hardware in _DESCRIBED else "libtpu describes none"
        return f"not checked how the mesh lies on a slice of {hardware}: {change}"
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


def describe(hardware: Name, devices: int, slices: int = 1) -> list[Any] | None:
    """So many devices as JAX would list them; None where nothing here can describe them.

    LensError where that many cannot be rented.
    """
    if HARDWARE[hardware].platform != "tpu":
        if slices != 1:
            raise LensError(f"--slices is {slices}; it must be 1 for {hardware}, which come in nodes")
        return [Gpu(number, number // HARDWARE[hardware].domain) for number in range(devices)]
    shape = sides(hardware, devices, slices)
    if hardware not in _DESCRIBED or importlib.util.find_spec("libtpu") is None:
        return None
    return _slices(hardware, shape, slices)


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
    if hardware not in _DESCRIBED:
        raise LensError(f"--compile: {hardware} cannot be compiled for without one; {', '.join(_DESCRIBED)} can")
    described = describe(hardware, devices, slices)
    if described is None:
        raise LensError("--compile needs the TPU's compiler: pip install 'lens-jax[tpu]'")
    return parallel.make_mesh(config, described)


@functools.cache
def _slices(hardware: Name, shape: tuple[int, ...], count: int) -> list[Any]:
    name = f"{hardware}:{'x'.join(map(str, shape))}"
    # A host has four chips, two by two.
    host = [min(2, size) for size in shape[:2]] + [1]
    several = {"num_slices": count} if count > 1 else {}
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        return topologies.get_topology_desc(name, platform="tpu", chips_per_host_bounds=host, **several).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise LensError(f"libtpu describes no slice {name}: {str(error).splitlines()[0]}") from None
