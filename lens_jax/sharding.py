"""Where every array lives: the mesh, one strict table of rules, and the gathering of weights.

Explicit sharding: how an array is laid out is part of its type, so a forgotten axis is an error and no slow collective.
Batches are split over `data` and `fsdp`, weights over `fsdp` (brought together a layer at a time, see `gather`) and
`tensor` (never brought together: each device has its heads and its part of the MLP), activations over `sequence`.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from lens_jax.errors import LensError

AXES = ("data", "fsdp", "tensor", "sequence")
# Rows of a batch.
ROWS = ("data", "fsdp")
# Where `offload` keeps what only the update reads: memory of the host that a device can copy from by itself.
HOST = "pinned_host"


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


# Path of a parameter -> the mesh axis of each of its dimensions. Fused projections keep axes of their own (q/k/v,
# gate/up, heads), or a tensor axis could not cut them. Modulation is one vector a sample: not worth a tensor axis.
DENOISER_RULES: dict[str, tuple[str | None, ...]] = {
    r"blocks/(image|text)/modulation/kernel": (None, "fsdp", None),
    r"blocks/(image|text)/modulation/bias": (None, None),
    r"blocks/(image|text)/norm(1|2|_q|_k)/scale": (None, None),
    r"blocks/(image|text)/qkv/kernel": (None, "fsdp", None, "tensor", None),
    r"blocks/(image|text)/qkv/bias": (None, None, "tensor", None),
    r"blocks/(image|text)/out/kernel": (None, "tensor", None, "fsdp"),
    r"blocks/(image|text)/out/bias": (None, None),
    r"blocks/(image|text)/gate_up/kernel": (None, "fsdp", None, "tensor"),
    r"blocks/(image|text)/down/kernel": (None, "tensor", "fsdp"),
    r"(image_in|time_in)/kernel": (None, "fsdp"),
    r"(text_in|time_out|modulation_out|image_out)/kernel": ("fsdp", None),
    r"(image_in|text_in|time_in|time_out|modulation_out|image_out)/bias": (None,),
    r"text_norm/scale": (None, None),
}
# 84M parameters, and convolutions with 3 and 128 channels: whole on every device.
AUTOENCODER_RULES = {
    r"(encoder|decoder)/.*": (),
    r"latent_statistics/(mean|variance|batches)": (),
    # The pixel codec in its place.
    r"mean|std": (),
}
# The experts are 91 % of the weights. Cut along the outputs: 5,760 and 2,880 rows, and not the 32 experts.
GPT_OSS_RULES = {
    r"embed|unembed": (None, "fsdp"),
    r"layers/(q|k|v)/kernel": (None, "fsdp", None, None),
    r"layers/out/kernel": (None, None, None, "fsdp"),
    r"layers/(q|k|v)/bias": (None, None, None),
    r"layers/experts/(gate_up|down)/blocks": (None, None, "fsdp", None, None),
    r"layers/experts/(gate_up|down)/scales": (None, None, "fsdp", None),
    r"layers/experts/(gate_up|down)/kernel": (None, None, None, "fsdp"),
    r"layers/experts/(gate_up|down)/bias": (None, None, None),
    r"layers/router/kernel": (None, None, None),
    r"layers/(out|router)/bias|layers/sinks|layers/(attention|mlp)_norm/scale": (None, None),
    r"norm/scale": (None,),
}


def spec_of(rules: dict, path: str, shape: tuple[int, ...], mesh) -> PartitionSpec:
    """The layout of one parameter; LensError when no rule names it or an axis does not divide it."""
    axes = next((axes for pattern, axes in rules.items() if re.fullmatch(pattern, path)), None)
    if axes is None:
        raise LensError(f"no sharding rule for the parameter {path} {list(shape)}; add one to lens_jax/sharding.py")
    if axes and len(axes) != len(shape):
        raise LensError(f"the sharding rule of {path} is {axes}, for {len(axes)} dimensions; it has {list(shape)}")
    for axis, size in zip(axes, shape):
        if axis and size % mesh.shape[axis]:
            best = math.gcd(size, mesh.shape[axis])
            raise LensError(
                f"mesh.{axis} is {mesh.shape[axis]}, which does not divide {size} of {path} {list(shape)}; {best} does"
            )
    # An axis of one device cuts nothing; named all the same, it would ask for collectives of one.
    return PartitionSpec(*(axis if axis and mesh.shape[axis] > 1 else None for axis in axes))


def tree_specs(rules: dict, tree: Any, mesh) -> Any:
    """The layout of every leaf of a tree of parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: spec_of(rules, _path(path), leaf.shape, mesh), tree)


def state_specs(state: Any, mesh) -> Any:
    """The layout of a training state: average and moments like their parameters, scalars everywhere."""

    def spec(path, leaf):
        # Optimisers nest copies of the tree of parameters in tuples and named tuples; what has no path is a counter.
        where = _path(path)
        if not where:
            return PartitionSpec()
        return spec_of(AUTOENCODER_RULES if path[0].name == "codec" else DENOISER_RULES, where, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(spec, state)


def _path(path) -> str:
    return "/".join(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def shardings(mesh: Mesh, specs: Any) -> Any:
    """A tree of layouts as one of shardings."""
    is_spec = lambda x: isinstance(x, PartitionSpec)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def state_shardings(state: Any, mesh, offload: bool = False) -> Any:
    """Where every leaf of a training state is; without a mesh, None: on the only device."""

    def place(path, spec):
        kind = HOST if offload and _only_updated(path) else None
        if mesh is not None:
            return NamedSharding(mesh, spec, memory_kind=kind)
        return SingleDeviceSharding(jax.local_devices()[0], memory_kind=kind) if kind else None

    specs = jax.tree.map(lambda _: PartitionSpec(), state) if mesh is None else state_specs(state, mesh)
    return jax.tree_util.tree_map_with_path(place, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _only_updated(path) -> bool:
    """Whether a leaf of a state is an array of the average or the moments: no forward or backward pass reads it."""
    return path[0].name in ("ema", "opt_state") and bool(_path(path))


def move_offloaded(state: Any, space: jax.memory.Space) -> Any:
    """A state with average and moments in the memory of the host or of the devices; for use inside a program."""
    move = lambda path, leaf: jax.device_put(leaf, space) if _only_updated(path) else leaf
    return jax.tree_util.tree_map_with_path(move, state)


def on_device(tree: Any, mesh: Mesh | None) -> Any:
    """What was offloaded of a tree, copied into the memory of its devices."""
    is_away = lambda x: x.sharding.memory_kind == HOST
    return on(mesh, _copy)(tree) if any(map(is_away, jax.tree.leaves(tree))) else tree


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def create(make, mesh: Mesh | None, *args, offload: bool = False) -> Any:
    """`make(*args)`, a state, computed where it will live: no device ever holds all of it.

    Compiled with automatic axes, since random draws follow their results' layout there; values do not depend on it.
    All but the first of `args` become part of the state and are used up.
    """
    used_up = tuple(range(1, len(args)))
    shapes = jax.eval_shape(make, *args)
    if mesh is None:
        return jax.jit(make, out_shardings=state_shardings(shapes, None, offload), donate_argnums=used_up)(*args)
    automatic = Mesh(mesh.devices, mesh.axis_names)
    is_placed = lambda x: isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding)
    place = lambda x: relabel(x, NamedSharding(automatic, x.sharding.spec)) if is_placed(x) else x
    places = state_shardings(shapes, automatic, offload)
    made = jax.jit(make, out_shardings=places, donate_argnums=used_up)(*jax.tree.map(place, args))
    return jax.tree.map(relabel, made, state_shardings(shapes, mesh, offload))


def relabel(array: jax.Array, place: NamedSharding) -> jax.Array:
    """The same parts of an array on the same devices, under another name for where they are.

    What device_put would do too, but for a key whose devices are not all of this process.
    """
    return jax.make_array_from_single_device_arrays(array.shape, place, [x.data for x in array.addressable_shards])


def abstract(make, mesh: Mesh | None, *args, offload: bool = False) -> Any:
    """Shapes, dtypes and, on a mesh, layouts of what `create` makes, to restore a checkpoint of any other mesh into."""
    shapes = jax.eval_shape(make, *args)
    leaves, tree = jax.tree.flatten(shapes)
    places = tree.flatten_up_to(state_shardings(shapes, mesh, offload))
    return tree.unflatten(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x, place in zip(leaves, places))


def abstract_params(tree: Any, rules: dict, mesh: Mesh | None) -> Any:
    """Shapes, dtypes and, on a mesh, layouts of the parameters of one network."""
    if mesh is None:
        return tree
    places = shardings(mesh, tree_specs(rules, tree, mesh))
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def on(mesh: Mesh | None, function):
    """`function`, called with `mesh` set."""
    if mesh is None:
        return function

    def run(*args):
        with jax.set_mesh(mesh):
            return function(*args)

    return run


def gather(params: dict, dtype) -> dict:
    """Weights brought together over `fsdp` in `dtype`, which halves what is sent when that is bfloat16.

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
    """One weight brought together. Its gradient stays unsummed until it is here, where each device gets its part.

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


def batch_spec(name: str, ndim: int, mesh) -> PartitionSpec:
    """The layout of one array of a batch: rows over ROWS, latent and text tokens over `sequence`."""
    if name in ("positions", "n_image"):
        return PartitionSpec()
    rows = tuple(axis for axis in ROWS if mesh.shape[axis] > 1) or None
    tokens = "sequence" if ndim == 3 and mesh.shape["sequence"] > 1 else None
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
            f"data: a batch of {size} pictures cannot be split over mesh.data {mesh.shape['data']} x mesh.fsdp "
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
