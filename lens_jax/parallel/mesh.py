"""The mesh of a run, and what crosses it: small arrays onto all devices, small numbers between the processes.

Explicit sharding: how an array is laid out is part of its type, so a forgotten axis is an error and no slow collective.
Batches are split over `data` and `fsdp`, weights over `fsdp` and `tensor`, activations over `sequence`.
"""

import dataclasses
import functools
import math
import warnings
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lens_jax.errors import LensError, LensWarning
from lens_jax.parallel.layout import AXES, arrange

# What gradients are summed in over devices: the model's dtype, or float32.
ReduceDtype = Literal["compute", "float32"]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1, on one axis at most, takes what is left."""

    # Copies of the model, each on its own rows of a batch. Above the size of a node this is the cheapest axis.
    data: int = 1
    # Shards of parameters, optimiser and average; also splits the rows. Best within a fast network.
    fsdp: int = -1
    # Parts of every head group and MLP; must divide the heads. Only within a node, and only when fsdp does not fit.
    tensor: int = 1
    # Parts of every sequence; with `tensor` it must divide the heads. For sizes above 1440 pixels.
    sequence: int = 1
    # What gradients are summed in over `data` and `fsdp`: the dtype that the model computes in, or float32. Rounding
    # of bfloat16 sums grows with the devices; float32 sends twice the bytes, and `lens-jax plan` says how many.
    reduce_dtype: ReduceDtype = "compute"

    def __post_init__(self):
        for name in AXES:
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise LensError(f"mesh.{name} is {getattr(self, name)}; it must be at least 1, or -1 for what is left")
        if [getattr(self, name) for name in AXES].count(-1) > 1:
            raise LensError("mesh: -1 (what is left) is for one axis only")

    def sizes(self, devices: int) -> tuple[int, ...]:
        """Devices along each of AXES; LensError when they do not multiply to `devices`."""
        sizes = [getattr(self, name) for name in AXES]
        if self.reduce_dtype == "float32" and self.sequence != 1:
            raise LensError(
                "mesh.reduce_dtype is float32, which works with mesh.sequence 1 only; compute works with any"
            )
        known = math.prod(size for size in sizes if size != -1)
        left, over = divmod(devices, known)
        if over or (-1 not in sizes and left != 1):
            shape = ", ".join(f"{name} {size}" for name, size in zip(AXES, sizes))
            largest = max(range(len(AXES)), key=sizes.__getitem__)
            rest = known // sizes[largest]
            # With an axis that takes what is left any divisor would do, without one only what is left itself.
            best = math.gcd(sizes[largest], devices // rest) if -1 in sizes else devices // rest
            change = "their product must" if devices % rest else f"mesh.{AXES[largest]} {best} would"
            there = "the one device there is" if devices == 1 else f"{devices} devices"
            raise LensError(f"mesh ({shape}) does not fit {there}; {change}, or set one axis to -1")
        return tuple(left if size == -1 else size for size in sizes)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of a run over all devices (or descriptions of some), laid out by `layout.arrange`."""
    devices = jax.devices() if devices is None else devices
    layout = arrange(config.sizes(len(devices)), devices)
    if layout.plain:
        warnings.warn(f"mesh: {layout.how}; a mesh of powers of two would be faster", LensWarning, stacklevel=2)
    return Mesh(layout.devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def described(devices: list) -> str:
    """`8 devices (gpu, NVIDIA H100 80GB HBM3)`."""
    count = "1 device" if len(devices) == 1 else f"{len(devices)} devices"
    kinds = dict.fromkeys((device.platform, device.device_kind) for device in devices)
    return f"{count} ({'; '.join(p if p == k else f'{p}, {k}' for p, k in kinds)})"


def on(mesh: Mesh | None, function):
    """`function`, called with `mesh` set."""
    if mesh is None:
        return function

    def run(*args):
        with jax.set_mesh(mesh):
            return function(*args)

    return run


def everywhere(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """An array that all processes have, whole on every device of the mesh."""
    if mesh is None:
        return jax.numpy.asarray(array)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, PartitionSpec()), lambda index: array[index])


def largest(number: int, mesh: Mesh) -> jax.Array:
    """The largest of the numbers that the processes give, as a scalar on all of them; nobody waits for it."""
    every = NamedSharding(mesh, PartitionSpec(AXES))
    # One a device, wherever in the mesh the devices of this process are.
    numbers = jax.make_array_from_callback((mesh.size,), every, lambda index: np.full(1, number, np.int32))
    return _max(mesh)(numbers)


def of_first_process(tree: Any) -> Any:
    """What process 0 has of a tree of numpy arrays: sums may differ in a bit between kinds of processors."""
    from jax.experimental import multihost_utils

    return jax.device_get(multihost_utils.broadcast_one_to_all(tree)) if jax.process_count() > 1 else tree


@functools.cache
def _max(mesh: Mesh):
    return jax.jit(lambda x: jax.numpy.max(x), out_shardings=NamedSharding(mesh, PartitionSpec()))


def local_copy(tree: Any, mesh: Mesh | None) -> Any:
    """A tree whole on this process's first device, for what runs without a mesh. All processes must call it."""
    if mesh is None:
        return tree
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), whole)
