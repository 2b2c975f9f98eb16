"""The rows of a batch: which of them a host reads, and how they come onto its devices.

A mesh puts devices where the network has them, so the rows of a host are in general not one block, and hosts along
`tensor` or `sequence` hold the same ones. Every host reads whole rows, whichever its devices hold, and gives each
device its part.
"""

import functools
from collections import defaultdict
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lens_jax.errors import LensError
from lens_jax.parallel.layout import ROWS


def batch_spec(name: str, ndim: int, mesh) -> PartitionSpec:
    """The layout of one array of a batch: rows over ROWS, latent and text tokens over `sequence`; scalars have none."""
    if name == "positions" or ndim == 0:
        return PartitionSpec()
    rows = tuple(axis for axis in ROWS if mesh.shape[axis] > 1) or None
    tokens = "sequence" if name in ("latents", "text") and mesh.shape["sequence"] > 1 else None
    return PartitionSpec(rows, *((tokens,) + (None,) * (ndim - 2) if ndim > 1 else ()))


def abstract_array(name: str, shape: tuple[int, ...], dtype, mesh) -> jax.ShapeDtypeStruct:
    """Shape, dtype and, on a mesh, layout of one array of a batch."""
    place = None if mesh is None else NamedSharding(mesh, batch_spec(name, len(shape), mesh))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def check_batch_size(size: int, mesh) -> None:
    """LensError unless the rows of a batch can be split over the mesh, an abstract one too."""
    if mesh is None:
        return
    parts = _parts(mesh)
    if size < 1 or size % parts:
        raise LensError(
            f"data: a batch of {size} images cannot be split over mesh.data {mesh.shape['data']} x mesh.fsdp "
            f"{mesh.shape['fsdp']}; give a multiple of {parts}"
        )


def rows_of_host(mesh: Mesh | None, batch_size: int, process: int | None = None) -> np.ndarray:
    """The rows of a global batch that a process's devices hold: int64, sorted; all of them without a mesh.

    Args:
      process: whose; None is this one. Its devices need not be there, so hosts of a slice that is only described have
        rows too.
    """
    if mesh is None:
        return np.arange(batch_size)
    check_batch_size(batch_size, mesh)
    return _by_process(mesh, batch_size)[jax.process_index() if process is None else process]


def global_rows(mesh: Mesh | None, count: int, process: int | None = None) -> int:
    """The size of the batch of which a process holds `count` rows."""
    if mesh is None:
        return count
    parts = _parts(mesh)
    mine = len(rows_of_host(mesh, parts, process))
    if count < 1 or count % mine:
        raise LensError(f"data: {count} rows for a host whose devices hold {mine} of {parts} parts of a batch")
    return count // mine * parts


def place_batch(batch: dict, mesh: Mesh | None) -> dict:
    """This process's rows of a batch, in the order of `rows_of_host`, as global arrays; without a mesh as it is.

    What has no rows, `positions` and scalars, is the same on every process, and whole on every device.
    """
    if mesh is None:
        return batch

    def place(path, value):
        value = np.asarray(value)
        shape, layout, block = blocks(path[0].key, value, mesh)
        return jax.make_array_from_callback(shape, layout, block)

    return jax.tree_util.tree_map_with_path(place, batch)


def blocks(
    name: str, value: np.ndarray, mesh: Mesh, process: int | None = None
) -> tuple[tuple[int, ...], NamedSharding, Callable[[tuple[slice, ...]], np.ndarray]]:
    """(global shape, layout, what is at a global index) of an array of which a process has `value`, its rows."""
    layout = NamedSharding(mesh, batch_spec(name, value.ndim, mesh))
    if not layout.spec:
        return value.shape, layout, lambda index: value[index]
    size = global_rows(mesh, len(value), process)
    rows = rows_of_host(mesh, size, process)

    def block(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(size)
        # The rows of a device are neighbours in the batch, and so among those of its host.
        first = int(np.searchsorted(rows, start))
        return value[first : first + stop - start, *index[1:]]

    return (size, *value.shape[1:]), layout, block


def _parts(mesh) -> int:
    """Into how many the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


@functools.lru_cache(maxsize=256)
def _by_process(mesh: Mesh, size: int) -> dict[int, np.ndarray]:
    """The rows of every process with devices in the mesh."""
    where = NamedSharding(mesh, batch_spec("text_lengths", 1, mesh)).devices_indices_map((size,))
    parts = defaultdict(set)
    for device, index in where.items():
        parts[device.process_index].add(index[0].indices(size)[:2])
    found = {process: np.concatenate([np.arange(*part) for part in sorted(mine)]) for process, mine in parts.items()}
    for rows in found.values():
        rows.flags.writeable = False
    return found
