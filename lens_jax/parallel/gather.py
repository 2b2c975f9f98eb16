"""Weights sharded over `fsdp`, gathered a layer at a time; their gradients are reduce-scattered the same way."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lens_jax.parallel.layout import ROWS
from lens_jax.parallel.mesh import ReduceDtype


def gather(params: dict, dtype, reduce_dtype: ReduceDtype = "compute") -> dict:
    """Weights gathered over `fsdp` in `dtype`, which halves what is sent when that is bfloat16.

    Called on one layer inside the scan. Sharded over `tensor` they stay sharded. Gradients are summed over the rows'
    axes in `dtype` too, or those of kernels and adapters in float32: biases and scales are 0.04 % of the parameters,
    and their sums are part of an addition, which has no other dtype.
    """
    exact = reduce_dtype == "float32"
    mesh = jax.sharding.get_abstract_mesh()

    def one(path, weight: jax.Array) -> jax.Array:
        if mesh.empty:
            return weight.astype(dtype)
        spec = tuple(jax.typeof(weight).sharding.spec)
        # Of a sharded sequence the gradients of some weights are sums over its parts too, and of others not.
        if mesh.shape["sequence"] > 1:
            return _whole(weight, spec, dtype)
        # Where nothing is gathered, XLA sums what it made: in the dtype of the weight as it was used.
        if "fsdp" in spec or (exact and _rows() and path[-1].key in ("kernel", "a", "b")):
            return _gather(weight, spec, dtype, exact)
        return weight.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(weight: jax.Array, spec: tuple[str | None, ...], dtype, exact: bool) -> jax.Array:
    """One weight gathered. Its gradient stays unsummed until it is here, where each device gets its shard.

    Left to itself the gradient would be summed whole on every device and then split: XLA does not see a reduce-scatter
    in that where a transposition is in between, neither on a CPU nor on a TPU.
    """
    return _whole(weight, spec, dtype, reduced=_rows())


def _whole(weight: jax.Array, spec: tuple[str | None, ...], dtype, **kind) -> jax.Array:
    axes = (None if axis == "fsdp" else axis for axis in spec)
    return jax.reshard(weight.astype(dtype), PartitionSpec(*axes, **kind))


def _gather_forward(weight, spec, dtype, exact):
    return _gather(weight, spec, dtype, exact), jnp.zeros((), weight.dtype)


def _gather_backward(spec, dtype, exact, like, gradient):
    rows = _rows()

    def scatter(part: jax.Array) -> jax.Array:
        part = part.astype(jnp.float32) if exact else part
        if "fsdp" not in spec:
            return jax.lax.psum(part, tuple(axis for axis in ROWS if axis in rows))
        part = jax.lax.psum_scatter(part, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True)
        return jax.lax.psum(part, "data") if "data" in rows else part

    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec), unreduced=rows)
    cut = jax.shard_map(scatter, in_specs=whole, out_specs=PartitionSpec(*spec))(gradient)
    return (cut.astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def _rows() -> set[str]:
    """The axes that rows are sharded over on the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis for axis in ROWS if mesh.shape[axis] > 1}
