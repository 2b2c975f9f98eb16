"""Weights sharded over `fsdp`, gathered a layer at a time; the gradient is scattered the same way."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lens_jax.parallel.layout import ROWS


def gather(params: dict, dtype) -> dict:
    """Weights gathered over `fsdp` in `dtype`, which halves what is sent when that is bfloat16.

    Called on one layer inside the scan. Cut over `tensor` they stay cut.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def one(weight: jax.Array) -> jax.Array:
        if mesh.empty:
            return weight.astype(dtype)
        spec = tuple(jax.typeof(weight).sharding.spec)
        if "fsdp" not in spec:
            return weight.astype(dtype)
        # Of a cut sequence the gradients of some weights are sums over its parts too, and of others not.
        return _whole(weight, spec, dtype) if mesh.shape["sequence"] > 1 else _gather(weight, spec, dtype)

    return jax.tree.map(one, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: jax.Array, spec: tuple[str | None, ...], dtype) -> jax.Array:
    """One weight gathered. Its gradient stays unsummed until it is here, where each device gets its part.

    Left to itself the gradient would be summed whole on every device and then cut: XLA does not see a reduce-scatter
    in that where a transposition is in between, neither on a CPU nor on a TPU.
    """
    return _whole(weight, spec, dtype, reduced=_rows())


def _whole(weight: jax.Array, spec: tuple[str | None, ...], dtype, **kind) -> jax.Array:
    axes = (None if axis == "fsdp" else axis for axis in spec)
    return jax.reshard(weight.astype(dtype), PartitionSpec(*axes, **kind))


def _gather_forward(weight, spec, dtype):
    return _gather(weight, spec, dtype), jnp.zeros((), weight.dtype)


def _gather_backward(spec, dtype, like, gradient):
    rows = _rows()

    def scatter(part: jax.Array) -> jax.Array:
        part = jax.lax.psum_scatter(part, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True)
        return jax.lax.psum(part, "data") if "data" in rows else part

    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec), unreduced=rows)
    cut = jax.shard_map(scatter, in_specs=whole, out_specs=PartitionSpec(*spec))(gradient)
    return (cut.astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def _rows() -> set[str]:
    """The axes that rows are cut over on the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis for axis in ROWS if mesh.shape[axis] > 1}
