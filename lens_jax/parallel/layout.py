"""Which device stands where in a mesh: neighbours along the last axes, and slow networks crossed by the first ones.

A slice of TPUs is a torus, so its devices are ordered by where they are and not by host; several slices, or nodes of
GPUs, are joined by a slower network. Nothing here needs a device that is there: a description of one will do, with
`id`, `platform` and `process_index`, on a TPU with `device_kind`, `coords`, `core_on_chip` and `slice_index` too.
`jax.make_mesh` knows one slice only, and takes two nodes of GPUs for two slices.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import mesh_utils

from lens_jax.errors import LensError

AXES = ("data", "fsdp", "tensor", "sequence")

# Rows of a batch.
ROWS = ("data", "fsdp")


class Layout(NamedTuple):
    """Devices in their places."""

    # [data, fsdp, tensor, sequence] of devices.
    devices: np.ndarray
    # How they were put there, in words; "" where nobody needs to know.
    how: str
    # Whether neighbours of the mesh may be far from each other, because the topology gave no better order.
    plain: bool = False


def arrange(sizes: Sequence[int], devices: Sequence[Any]) -> Layout:
    """So many devices along each of AXES, as the networks between them have it.

    LensError where something other than rows or parameters would have to cross the network between TPU slices.
    """
    if devices[0].platform != "tpu":
        # GPUs of a node reach each other equally fast, whether one process drives them or many. Sorted so, an axis
        # crosses nodes only where those behind it fill them.
        place = lambda device: (_slice(device), device.process_index, device.id)
        nodes = len({place(device)[:2] for device in devices})
        ordered = _array(sorted(devices, key=place))
        return Layout(ordered.reshape(sizes), f"{nodes} nodes in order" if nodes > 1 else "")
    slices = defaultdict(list)
    for device in devices:
        slices[_slice(device)].append(device)
    if len(slices) == 1:
        return _torus(sizes, devices)
    across = _across(sizes, [len(members) for members in slices.values()])
    within = [size // share for size, share in zip(sizes, across)]
    parts = [_torus(within, slices[index]) for index in sorted(slices)]
    # [slices over data, over fsdp, 1, 1, data within a slice, fsdp within, tensor, sequence], then each pair as one.
    stacked = np.stack([part.devices for part in parts]).reshape(*across, *within)
    joined = stacked.transpose(0, 4, 1, 5, 2, 6, 3, 7).reshape(sizes)
    axes = " x ".join(f"{axis} {share}" for axis, share in zip(AXES, across) if share > 1)
    how = f"{len(slices)} slices along {axes}, each {parts[0].how}"
    return Layout(joined, how, any(part.plain for part in parts))


def _slice(device) -> int:
    """The number of what a fast network joins: a slice of TPUs, a node or rack of GPUs; 0 where JAX does not say."""
    found = getattr(device, "slice_index", None)
    return (getattr(device, "partition_index", None) if found is None else found) or 0


def _across(sizes: Sequence[int], chips: list[int]) -> tuple[int, ...]:
    """How many slices each axis is laid across: as many as possible along `data`, the others along `fsdp`."""
    if len(set(chips)) > 1:
        raise LensError(f"mesh: the {len(chips)} slices have {sorted(set(chips))} chips; all must have as many")
    left, across = len(chips), [1] * len(sizes)
    for axis in ROWS:
        place = AXES.index(axis)
        across[place] = math.gcd(sizes[place], left)
        left //= across[place]
    if left > 1:
        named = dict(zip(AXES, sizes))
        axis = max(("tensor", "sequence"), key=named.get)
        rest = named["tensor"] * named["sequence"] // named[axis]
        best = math.gcd(named[axis], chips[0] // math.gcd(rest, chips[0]))
        raise LensError(
            f"mesh: tensor {named['tensor']} x sequence {named['sequence']} must divide the {chips[0]} chips of each "
            f"of the {len(chips)} slices, or it would cross between them; mesh.{axis} {best} would"
        )
    return tuple(across)


def _torus(sizes: Sequence[int], devices: Sequence[Any]) -> Layout:
    """The devices of one slice: each axis along sides of the torus, along parts of sides, or else host by host."""
    lengths = [1 + max(side) - min(side) for side in zip(*(device.coords for device in devices))]
    sides = "x".join(str(length) for length in lengths if length > 1) or "1"
    for split, how in ((False, f"along the {sides} torus"), (True, f"along parts of the {sides} torus")):
        try:
            return Layout(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=split), how)
        # It raises what it happens to come upon: no such assignment, no cuboid, two cores a chip.
        except (NotImplementedError, AssertionError, ValueError, TypeError):
            continue
    ordered = _array(sorted(devices, key=lambda device: (device.process_index, device.id)))
    return Layout(ordered.reshape(sizes), f"host by host, since the {sides} torus has no such mesh", plain=True)


def _array(devices: Sequence[Any]) -> np.ndarray:
    """One dimension of objects, whatever they are."""
    array = np.empty(len(devices), object)
    array[:] = devices
    return array
