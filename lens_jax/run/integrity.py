"""A checksum of every array, the same on any mesh: shows that what was restored is, bit for bit, what was saved.

Files have checksums of their own only in part: orbax's index (OCDBT) has, its compressed chunks have not, and a flipped
bit in the mantissas of a chunk goes unnoticed. Summed on the devices, in one pass over their memory, it costs no second
reading of files and covers the whole way to the disk and back.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lens_jax import parallel


def checksums(tree: Any, mesh: Mesh | None) -> dict[str, int]:
    """Path -> checksum of 32 bits of every array in a tree. On a mesh all processes must call it."""
    paths, leaves = zip(*leaves_by_path(tree)) if tree else ((), ())
    if mesh is not None:
        # With automatic axes: the layouts of what is summed here are nothing to be strict about.
        mesh = Mesh(mesh.devices, mesh.axis_names)
        leaves = [parallel.relabel(leaf, _under(mesh, leaf.sharding)) for leaf in leaves]
    return dict(zip(paths, map(int, jax.device_get(_program(mesh)(list(leaves))))))


def leaves_by_path(tree: Any) -> list[tuple[str, Any]]:
    """Leaves by path, the same for namedtuples and for the lists and dicts that metadata holds in their place."""
    return [
        ("/".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", "")))) for k in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _under(mesh: Mesh, place: NamedSharding) -> NamedSharding:
    return NamedSharding(mesh, place.spec, memory_kind=place.memory_kind)


@functools.cache
def _program(mesh: Mesh | None):
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda leaves: jnp.stack([_checksum(leaf) for leaf in leaves]), out_shardings=everywhere)


def _checksum(array: jax.Array) -> jax.Array:
    """uint32: the sum, modulo 2^32 and so in any order, of the hashes of all (index, bits)."""
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    # From the memory of the host, where what was offloaded is.
    array = jax.device_put(array, jax.memory.Space.Device)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    index = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        stride = math.prod(array.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride) if size > 1 else 0
    return jnp.sum(_mix(bits ^ _mix(index + jnp.uint32(0x9E3779B9))), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    # The finaliser of MurmurHash3, a bijection of 32-bit words.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
