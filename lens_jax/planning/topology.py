"""A slice of TPUs that is not there: libtpu, the TPU's own compiler, compiles for any slice on any machine."""

import importlib.util
import itertools
import math
import os

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from lens_jax import parallel
from lens_jax.errors import LensError
from lens_jax.parallel import MeshConfig
from lens_jax.planning.hardware import Name

# Axes of the network between the chips. A v4 would be compiled for as two small devices a chip, not as one.
_DIMENSIONS: dict[str, int] = {"v5e": 2, "v5p": 3, "v6e": 2}
# libtpu looks for the machine it is on and complains for pages where there is none.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
}


def slice_mesh(config: MeshConfig, hardware: Name, devices: int) -> Mesh:
    """The mesh of a run over a slice of so many TPUs, of one too; LensError where there is no such slice."""
    if hardware not in _DIMENSIONS:
        raise LensError(f"--compile: {hardware} cannot be compiled for without one; {', '.join(_DIMENSIONS)} can")
    if importlib.util.find_spec("libtpu") is None:
        raise LensError("--compile needs the TPU's compiler: pip install 'lens-jax[tpu]'")
    layout = _layout(devices, _DIMENSIONS[hardware])
    name = f"{hardware}:{'x'.join(map(str, layout))}"
    # A host has four chips, two by two.
    host = [min(2, size) for size in layout[:2]] + [1]
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        chips = topologies.get_topology_desc(name, platform="tpu", chips_per_host_bounds=host).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise LensError(f"--compile: no slice {name} of {devices} {hardware}: {str(error).splitlines()[0]}") from None
    return parallel.make_mesh(config, chips)


def _layout(devices: int, dimensions: int) -> tuple[int, ...]:
    """The sides of a slice, the most like a square or cube, from the shortest: 8 are 2 x 4 or 2 x 2 x 2."""
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    shapes = itertools.combinations_with_replacement(divisors, dimensions)
    return min((shape for shape in shapes if math.prod(shape) == devices), key=sum)
