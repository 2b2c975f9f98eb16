"""Where the arrays of a state live: created, described and moved in the layout that the rules give."""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from lens_jax.errors import LensError
from lens_jax.parallel.mesh import on
from lens_jax.parallel.rules import Rules, Table, path_of, spec_of, tree_specs

# Where `offload` keeps what only the update reads: memory of the host that a device can copy from by itself.
HOST = "pinned_host"


def state_specs(state: Any, rules: Rules, mesh) -> Any:
    """The layout of a training state: average and moments like their parameters, scalars everywhere.

    rules: a table for each named tree in it, {"denoiser": DENOISER_RULES}.
    """

    def spec(path, leaf):
        # Optimisers nest copies of the tree of parameters in tuples and named tuples; what has no path is a counter.
        name, _, where = path_of(path).partition("/")
        if not name:
            return PartitionSpec()
        if name not in rules:
            raise LensError(f"no sharding rules for the tree {name!r}; the job has them for {', '.join(rules)}")
        return spec_of(rules[name], where, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(spec, state)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """A tree of layouts as one of shardings."""
    is_spec = lambda x: isinstance(x, PartitionSpec)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def state_shardings(state: Any, rules: Rules, mesh, offload: bool = False) -> Any:
    """Where every leaf of a training state is; without a mesh, None: on the only device."""

    def place(path, spec):
        kind = HOST if offload and _only_updated(path) else None
        if mesh is not None:
            return NamedSharding(mesh, spec, memory_kind=kind)
        return SingleDeviceSharding(jax.local_devices()[0], memory_kind=kind) if kind else None

    specs = jax.tree.map(lambda _: PartitionSpec(), state) if mesh is None else state_specs(state, rules, mesh)
    return jax.tree_util.tree_map_with_path(place, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _only_updated(path) -> bool:
    """Whether a leaf of a state is an array of the average or the moments: no forward or backward pass reads it."""
    return path[0].name in ("ema", "opt_state") and bool(path_of(path))


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


def create(make, rules: Rules, mesh: Mesh | None, *args, offload: bool = False) -> Any:
    """`make(*args)`, a state, computed where it will live: no device ever holds all of it.

    Compiled with automatic axes, since random draws follow their results' layout there; values do not depend on it.
    All but the first of `args` become part of the state and are used up.
    """
    used_up = tuple(range(1, len(args)))
    shapes = jax.eval_shape(make, *args)
    if mesh is None:
        return jax.jit(make, out_shardings=state_shardings(shapes, rules, None, offload), donate_argnums=used_up)(*args)
    automatic = Mesh(mesh.devices, mesh.axis_names)
    is_placed = lambda x: isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding)
    place = lambda x: relabel(x, NamedSharding(automatic, x.sharding.spec)) if is_placed(x) else x
    places = state_shardings(shapes, rules, automatic, offload)
    made = jax.jit(make, out_shardings=places, donate_argnums=used_up)(*jax.tree.map(place, args))
    return jax.tree.map(relabel, made, state_shardings(shapes, rules, mesh, offload))


def relabel(array: jax.Array, place: NamedSharding) -> jax.Array:
    """The same parts of an array on the same devices, under another name for where they are.

    What device_put would do too, but for a key whose devices are not all of this process.
    """
    return jax.make_array_from_single_device_arrays(array.shape, place, [x.data for x in array.addressable_shards])


def abstract(make, rules: Rules, mesh: Mesh | None, *args, offload: bool = False) -> Any:
    """Shapes, dtypes and, on a mesh, layouts of what `create` makes, to restore a checkpoint of any other mesh into."""
    shapes = jax.eval_shape(make, *args)
    leaves, tree = jax.tree.flatten(shapes)
    places = tree.flatten_up_to(state_shardings(shapes, rules, mesh, offload))
    return tree.unflatten(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x, place in zip(leaves, places))


def spread(tree: Any, mesh: Mesh | None) -> Any:
    """A tree of abstract arrays, those that are replicated along `data` sharded over it too, where that divides them.

    To read a checkpoint into: else every replica of the model would read all of it. `replicate` puts it right.
    """
    if mesh is None or mesh.shape["data"] == 1:
        return tree

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        place = leaf.sharding
        if not isinstance(place, NamedSharding):
            return leaf
        spec = list(place.spec) + [None] * (len(leaf.shape) - len(place.spec))
        for axis, names in enumerate(spec):
            names = (names,) if isinstance(names, str) else tuple(names or ())
            if "data" in names:
                return leaf
            if leaf.shape[axis] % math.prod(mesh.shape[name] for name in (*names, "data")) == 0:
                spec[axis] = (*names, "data")
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        return leaf

    return jax.tree.map(one, tree)


def replicate(tree: Any, like: Any, mesh: Mesh | None) -> Any:
    """What was read into `spread(like)` in the layout of `like`: an all-gather over `data`."""
    if mesh is None or mesh.shape["data"] == 1:
        return tree
    # With automatic axes, since nothing but the layout changes.
    automatic = Mesh(mesh.devices, mesh.axis_names)
    under = lambda place: NamedSharding(automatic, place.spec, memory_kind=place.memory_kind)
    leaves, structure = jax.tree.flatten(tree)
    wanted = [x.sharding for x in structure.flatten_up_to(like)]
    moved = [i for i, (x, place) in enumerate(zip(leaves, wanted)) if isinstance(place, NamedSharding)]
    gather = jax.jit(lambda parts: parts, out_shardings=[under(wanted[i]) for i in moved])
    found = gather([relabel(leaves[i], under(leaves[i].sharding)) for i in moved])
    for i, x in zip(moved, found):
        leaves[i] = relabel(x, wanted[i])
    return structure.unflatten(leaves)


def abstract_params(tree: Any, rules: Table, mesh: Mesh | None) -> Any:
    """Shapes, dtypes and, on a mesh, layouts of the parameters of one network."""
    if mesh is None:
        return tree
    places = shardings(mesh, tree_specs(rules, tree, mesh))
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)
