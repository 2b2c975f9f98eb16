"""Leaves read from files to a tree of arrays on devices, one at a time and in parts where they are cut."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding

from lens_jax.convert.table import Tensors


def place(lazy: Tensors, template: Mapping[str, Any], places: Mapping[str, Sharding] | None = None) -> dict:
    """The tree of the leaves of `template`, with its dtypes.

    The largest leaf first, so that a copy of it never stands beside all others. With `places` a process reads of a leaf
    what its devices hold: of the 20B text encoder's largest, 6.4 GB, a sixteenth on one of sixteen hosts.

    Args:
      lazy: leaves by path.
      template: something with shape and dtype for each path wanted.
      places: layout of each, on the devices of all processes; None is the default device.
    """
    largest_first = sorted(template, key=lambda path: -lazy.specs[path].bytes)
    made = {}
    for path in largest_first:
        like = template[path]
        if places is None:
            made[path] = _to_device(np.asarray(lazy[path]).astype(like.dtype, copy=False))
        else:
            made[path] = _spread(lazy.parts(path), like, places[path])
    return traverse_util.unflatten_dict({path: made[path] for path in template}, sep="/")


def _spread(parts: list[Callable[[], np.ndarray]], like, where: Sharding) -> jax.Array:
    """An array from the makers of its layers, or from one of the whole."""
    bounds = lambda index: tuple(s.indices(size)[:2] for s, size in zip(index, like.shape))
    blocks = {bounds(index): None for index in where.addressable_devices_indices_map(like.shape).values()}
    if len(parts) == 1:
        whole = parts[0]()
        blocks = {b: whole[tuple(slice(*ends) for ends in b)].astype(like.dtype, copy=False) for b in blocks}
    else:
        blocks = {b: np.empty([stop - start for start, stop in b], like.dtype) for b in blocks}
        for i, part in enumerate(parts):
            layer = part()
            for (first, *rest), block in blocks.items():
                if first[0] <= i < first[1]:
                    block[i - first[0]] = layer[tuple(slice(*ends) for ends in rest)]
    return jax.make_array_from_callback(like.shape, where, lambda index: blocks[bounds(index)])


def _to_device(leaf: np.ndarray) -> jax.Array:
    """`jax.device_put` that needs no second copy on a CPU.

    JAX takes over an array of the host as it is when it lies at a multiple of 64 bytes, which numpy's seldom do; else
    it copies and lets go of the original late. `jnp.asarray` would hold three copies at a time: 20 GB for one leaf.
    """
    if jax.default_backend() == "cpu" and leaf.ctypes.data % 64:
        room = np.empty(leaf.nbytes + 64, np.uint8)
        start = -room.ctypes.data % 64
        aligned = room[start : start + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
        aligned[...] = leaf
        leaf = aligned
    return jax.device_put(leaf)
