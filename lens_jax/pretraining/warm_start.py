"""What a new run starts from: the parameters of another run, of a release, or of a file of weights.

Read straight into the layout of the mesh: of a run each process reads its parts alone, of a release one array at a time
is in the memory of a host.
"""

from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from lens_jax import parallel
from lens_jax.errors import LensError
from lens_jax.models import denoiser
from lens_jax.pretraining.config import TrainConfig
from lens_jax.run import store


def load(
    config: TrainConfig, mesh: Mesh | None = None, say: Callable[[str], None] = print
) -> tuple[dict[str, jax.Array], dict | None]:
    """(parameters by path, float32, the codec's parameters where `init_from` has fitting ones).

    LensError lists every array that is missing, over, or of another shape, unless `init_partial`; then `say` does.
    """
    path = store.as_path(config.init_from)
    if not path.exists():
        from lens_jax.convert import source

        if "://" not in config.init_from:
            source.check_exists(Path(config.init_from))  # knows the name of a repository
        raise LensError(f"init_from {path}: no such file or folder")
    wanted = parallel.abstract_params(denoiser.abstract_params(config.model), parallel.DENOISER_RULES, mesh)
    wanted = flatten_dict(wanted, sep="/")
    if store.is_run(path):
        return _from_run(store.find(path), config, wanted, mesh, say)
    return _from_weights(Path(path), config, wanted, mesh, say), None


def _from_run(folder: epath.Path, config: TrainConfig, wanted: dict, mesh: Mesh | None, say):
    shapes = store.saved_shapes(folder)
    prefix = f"{config.init_part}/denoiser/"
    found = {path.removeprefix(prefix): shape for path, (shape, _) in shapes.items() if path.startswith(prefix)}
    chosen = _choose(f"init_from {folder} ({config.init_part})", config, wanted, found, say)
    parts = {config.init_part: {"denoiser": unflatten_dict(chosen, sep="/")}}
    # Latents normalised with other statistics would be something else than what these parameters know.
    statistics = config.codec.abstract_fitted()
    if statistics and not store.differences({"frozen": {"codec": statistics}}, shapes):
        parts["frozen"] = {"codec": parallel.abstract_params(statistics, parallel.AUTOENCODER_RULES, mesh)}
    loaded = store.load(folder, parts, mesh, partial=True)
    return flatten_dict(loaded[config.init_part]["denoiser"], sep="/"), loaded.get("frozen", {}).get("codec")


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
