"""The mesh of a run, and what crosses it: rows of batches onto the devices, small numbers between the processes.

Explicit sharding: how an array is laid out is part of its type, so a forgotten axis is an error and no slow collective.
Batches are split over `data` and `fsdp`, weights over `fsdp` and `tensor`, activations over `sequence`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lens_jax.errors import LensError

AXES = ("data", "fsdp", "tensor", "sequence")


# Rows of a batch.
ROWS = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1, on one axis at most, takes what is left."""

    # Copies of the model, each on its own rows of a batch. Above the size of a node this is the cheapest axis.
    data: int = 1
    # Parts that parameters, optimiser and average are cut into; also splits the rows. Best within a fast network.
    fsdp: int = -1
    # Parts of every head group and MLP; must divide the heads. Only within a node, and only when fsdp does not fit.
    tensor: int = 1
    # Parts of every sequence; with `tensor` it must divide the heads. For sizes above 1440 pixels.
    sequence: int = 1

    def __post_init__(self):
        for name in AXES:
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise LensError(f"mesh.{name} is {getattr(self, name)}; it must be at least 1, or -1 for what is left")
        if [getattr(self, name) for name in AXES].count(-1) > 1:
            raise LensError("mesh: -1 (what is left) is for one axis only")

    def sizes(self, devices: int) -> tuple[int, ...]:
        """Devices along each of AXES; LensError when they do not multiply to `devices`."""
        sizes = [getattr(self, name) for name in AXES]
        known = math.prod(size for size in sizes if size != -1)
        left, over = divmod(devices, known)
        if over or (-1 not in sizes and left != 1):
            shape = ", ".join(f"{name} {size}" for name, size in zip(AXES, sizes))
            largest = max(range(len(AXES)), key=sizes.__getitem__)
            rest = known // sizes[largest]
            # With an axis that takes what is left any divisor would do, without one only what is left itself.
            best = math.gcd(sizes[largest], devices // rest) if -1 in sizes else devices // rest
            change = "their product must" if devices % rest else f"mesh.{AXES[largest]} {best} would"
            raise LensError(f"mesh ({shape}) does not fit {devices} devices; {change}, or set one axis to -1")
        return tuple(left if size == -1 else size for size in sizes)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of a run over all devices, neighbours along the last axes."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(config.sizes(len(devices)), AXES, axis_types=(AxisType.Explicit,) * 4, devices=devices)


def on(mesh: Mesh | None, function):
    """`function`, called with `mesh` set."""
    if mesh is None:
        return function

    def run(*args):
        with jax.set_mesh(mesh):
            return function(*args)

    return run


def batch_spec(name: str, ndim: int, mesh) -> PartitionSpec:
    """The layout of one array of a batch: rows over ROWS, latent and text tokens over `sequence`."""
    if name in ("positions", "n_image"):
        return PartitionSpec()
    rows = tuple(axis for axis in ROWS if mesh.shape[axis] > 1) or None
    tokens = "sequence" if name in ("latents", "text") and mesh.shape["sequence"] > 1 else None
    return PartitionSpec(rows, *((tokens,) + (None,) * (ndim - 2) if ndim > 1 else ()))


def abstract_array(name: str, shape: tuple[int, ...], dtype, mesh) -> jax.ShapeDtypeStruct:
    """Shape, dtype and, on a mesh, layout of one array of a batch."""
    place = None if mesh is None else NamedSharding(mesh, batch_spec(name, len(shape), mesh))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def data_shard(mesh: Mesh | None) -> tuple[int, int]:
    """(part, parts) of every global batch that this process reads.

    Processes whose devices hold the same rows (a `tensor` or `sequence` axis over several hosts) read the same part.
    """
    if mesh is None:
        return 0, 1
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    mine = sorted({index[0] * mesh.shape["fsdp"] + index[1] for index in _local_indices(mesh)})
    count = len(mine)
    if mine != list(range(mine[0], mine[0] + count)) or mine[0] % count or parts % count:
        raise LensError(f"mesh: the rows of this host, {mine} of {parts}, are not one block; put tensor within a host")
    return mine[0] // count, parts // count


def _local_indices(mesh: Mesh) -> list[tuple[int, ...]]:
    here = jax.process_index()
    return [index for index, device in np.ndenumerate(mesh.devices) if device.process_index == here]


def check_batch_size(size: int, mesh: Mesh | None) -> None:
    """LensError unless the rows of a batch can be split over the mesh."""
    if mesh is None:
        return
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % parts:
        raise LensError(
            f"data: a batch of {size} images cannot be split over mesh.data {mesh.shape['data']} x mesh.fsdp "
            f"{mesh.shape['fsdp']}; give a multiple of {parts}"
        )


def place_batch(batch: dict, mesh: Mesh | None) -> dict:
    """This process's rows of a batch as global arrays; without a mesh the batch as it is."""
    if mesh is None:
        return batch

    def place(path, value):
        value = np.asarray(value)
        layout = NamedSharding(mesh, batch_spec(path[0].key, value.ndim, mesh))
        return jax.make_array_from_process_local_data(layout, value)

    return jax.tree_util.tree_map_with_path(place, batch)


def everywhere(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """An array that all processes have, whole on every device of the mesh."""
    if mesh is None:
        return jax.numpy.asarray(array)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, PartitionSpec()), lambda index: array[index])


def largest(number: int, mesh: Mesh) -> jax.Array:
    """The largest of the numbers that the processes give, as a scalar on all of them; nobody waits for it."""
    every = NamedSharding(mesh, PartitionSpec(AXES))
    numbers = jax.make_array_from_process_local_data(every, np.full(len(mesh.local_devices), number, np.int32))
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
