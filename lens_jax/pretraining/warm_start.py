"""What a new run starts from, or trains an adapter beside: a run, packed or not, a release, or weights.

Read straight into the layout of the mesh: of a run each process reads its parts alone, of a release one array at a time
is in the memory of a host.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from lens_jax import parallel
from lens_jax.convert import packed
from lens_jax.errors import LensError
from lens_jax.models import denoiser
from lens_jax.pretraining.config import TrainConfig
from lens_jax.run import store
from lens_jax.run.integrity import checksums
from lens_jax.run.state import Tree

# What `init_from` may name.
ACCEPTED = (
    'a run or one of its checkpoints, a packed run ("small" comes with the package), a release folder or its '
    "conversion, or a file of weights"
)


def load(
    config: TrainConfig, mesh: Mesh | None = None, say: Callable[[str], None] = print
) -> tuple[dict[str, jax.Array], dict | None]:
    """(parameters by path, the codec's parameters where `init_from` has fitting ones).

    float32; those that an adapter is trained beside are in the dtype that they are computed in. LensError lists every
    array that is missing, over, or of another shape, unless `init_partial`; then `say` does.
    """
    if file := packed.find(config.init_from):
        return _from_packed(packed.PackedFile(file), config, mesh, say)
    path = store.as_path(config.init_from)
    if not path.exists():
        from lens_jax.convert import source

        if "://" not in config.init_from:
            source.check_exists(Path(config.init_from))  # knows the name of a repository
        raise LensError(f"init_from {path}: no such file or folder")
    dtype = _dtype(config)
    if not store.is_run(path):
        return _from_weights(Path(path), config, _wanted(config, dtype, mesh), mesh, say), None
    params, codec = _from_run(store.find(path), config, _wanted(config, "float32", mesh), mesh, say)
    return params if dtype == "float32" else parallel.on(mesh, cast_program)(params, dtype), codec


def _dtype(config: TrainConfig) -> str:
    return config.model.dtype if config.lora.rank else "float32"


def _wanted(config: TrainConfig, dtype: str, mesh: Mesh | None) -> dict:
    """Shape, dtype and layout of each of the denoiser's parameters by path."""
    model = dataclasses.replace(config.model, param_dtype=dtype)
    wanted = parallel.abstract_params(denoiser.abstract_params(model), parallel.DENOISER_RULES, mesh)
    return flatten_dict(wanted, sep="/")


def _statistics(config: TrainConfig, mesh: Mesh | None) -> dict:
    """Of what the codec is fitted to; {} for one with released weights."""
    statistics = config.codec.abstract_fitted()
    return statistics and parallel.abstract_params(statistics, parallel.AUTOENCODER_RULES, mesh)


def cast(tree: Tree, dtype: str) -> Tree:
    """Parameters that nothing trains, in the dtype that they are computed in: rounded later they would be the same."""
    return jax.tree.map(lambda x: x.astype(dtype), tree)


cast_program = jax.jit(cast, static_argnums=1)


def check(config: TrainConfig) -> None:
    """LensError for an adapter without what it is trained beside."""
    if config.lora.rank and not config.init_from:
        raise LensError(
            f"lora.rank is {config.lora.rank}, but init_from names nothing to train an adapter beside; accepted: "
            f"{ACCEPTED}"
        )
    if config.lora.rank and config.init_partial:
        raise LensError("init_partial is not for an adapter (lora.rank): what it is beside must be whole")


def mark(params: dict, mesh: Mesh | None) -> Tree:
    """What a state keeps in `extra` of parameters that no checkpoint has, to know them when the run goes on."""
    return {"base": {"checksum": checksum(params, mesh)}}


def check_mark(extra: Tree, params: dict, mesh: Mesh | None, named: str, out: str) -> None:
    """LensError where `params`, read from what is `named`, are not those that the run in `out` began with."""
    if int(checksum(params, mesh)) != int(extra["base"]["checksum"]):
        raise LensError(
            f"{named}: not the parameters that the run in {out} began with in this model.dtype; give those, or choose "
            "another folder for a new run"
        )


def checksum(params: dict, mesh: Mesh | None) -> jax.Array:
    """uint32 scalar, laid out as in a state: tells parameters from others, whatever mesh they are on."""
    found = json.dumps(checksums(params, mesh), sort_keys=True)
    return parallel.everywhere(np.uint32(zlib.crc32(found.encode())), mesh)


def _from_run(folder: epath.Path, config: TrainConfig, wanted: dict, mesh: Mesh | None, say):
    shapes = store.saved_shapes(folder)
    if any(path.startswith(f"{config.init_part}/lora/") for path in shapes):
        raise LensError(
            f"init_from {folder}: a run that trained an adapter, and holds no denoiser; give a folder where `lens-jax "
            "convert to-torch` has written the two merged"
        )
    prefix = f"{config.init_part}/denoiser/"
    found = {path.removeprefix(prefix): shape for path, (shape, _) in shapes.items() if path.startswith(prefix)}
    chosen = _choose(f"init_from {folder} ({config.init_part})", config, wanted, found, say)
    parts = {config.init_part: {"denoiser": unflatten_dict(chosen, sep="/")}}
    # Latents normalised with other statistics would be something else than what these parameters know.
    statistics = _statistics(config, mesh)
    if statistics and not store.differences({"frozen": {"codec": statistics}}, shapes):
        parts["frozen"] = {"codec": statistics}
    loaded = store.load(folder, parts, mesh, partial=True)
    return flatten_dict(loaded[config.init_part]["denoiser"], sep="/"), loaded.get("frozen", {}).get("codec")


def _from_packed(file: packed.PackedFile, config: TrainConfig, mesh: Mesh | None, say):
    wanted = _wanted(config, _dtype(config), mesh)
    chosen = _choose(f"init_from {file.path}", config, wanted, file.shapes("denoiser"), say)
    statistics = flatten_dict(_statistics(config, mesh), sep="/")
    fits = {path: like.shape for path, like in statistics.items()} == file.shapes("codec")
    codec = unflatten_dict(file.take("codec", statistics), sep="/") if statistics and fits else None
    return file.take("denoiser", chosen), codec


def _from_weights(path: Path, config: TrainConfig, wanted: dict, mesh: Mesh | None, say) -> dict[str, jax.Array]:
    from lens_jax.convert import source
    from lens_jax.convert.place import place

    part = source.find(path).parts.get("denoiser")
    if part is None:
        raise LensError(f"init_from {path}: holds no denoiser")
    leaves = part.leaves(part.stored_config())
    found = {name: tuple(leaves.shape(name)) for name in leaves}
    chosen = _choose(f"init_from {path}", config, wanted, found, say)
    places = None if mesh is None else {name: like.sharding for name, like in chosen.items()}
    return flatten_dict(place(leaves, chosen, places), sep="/")


def _choose(where: str, config: TrainConfig, wanted: dict, found: dict[str, tuple[int, ...]], say) -> dict:
    """Those of `wanted` that are taken from what was found."""
    other = [path for path in wanted if path in found and found[path] != tuple(wanted[path].shape)]
    problems = {
        "missing": [path for path in wanted if path not in found],
        "over": sorted(found.keys() - wanted.keys()),
        "of another shape": [f"{path} {list(found[path])} for {list(wanted[path].shape)}" for path in other],
    }
    told = "; ".join(f"{len(paths)} {name}: {', '.join(paths)}" for name, paths in problems.items() if paths)
    chosen = {path: like for path, like in wanted.items() if path in found and path not in other}
    if not chosen:
        raise LensError(f"{where}: none of its {len(found)} arrays fits this model; {told}")
    if told and not config.init_partial:
        raise LensError(f"{where} is of another model; {told}. Take what fits with --init-partial")
    if told:
        say(f"{where}: {len(chosen)} of {len(wanted)} arrays fit, the others are drawn anew; {told}")
    return chosen
