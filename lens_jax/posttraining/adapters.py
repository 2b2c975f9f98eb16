"""Adapters: found in files and runs, laid out on devices, joined to one, or merged into weights."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from lens_jax import config as config_files
from lens_jax import parallel
from lens_jax.convert import lora as release_lora
from lens_jax.convert import lora_files
from lens_jax.convert.lora import Adapter
from lens_jax.errors import LensError
from lens_jax.models import denoiser, lora
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.lora import LoraConfig

# Fields of a model that say nothing of its sizes.
_COMPUTE = ("dtype", "param_dtype", "remat", "unroll", "attention")


class Loaded(NamedTuple):
    """An adapter on the devices of a pipeline."""

    # Without its scale.
    tree: dict
    # What it adds is times this: alpha / rank, times what it was loaded with.
    scale: float


def read(path: str | Path, model: DenoiserConfig, part: str = "ema") -> Adapter:
    """The adapter in a file, a PEFT folder, or a part of a run; LensError if it is for another denoiser."""
    from lens_jax.run import store

    if "://" in str(path) or (Path(path).is_dir() and store.is_run(store.as_path(path))):
        adapter, trained = read_run(path, part)
        sizes = lambda config: {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        ours, theirs = sizes(model), sizes(trained)
        other = [n for n in ours if n not in _COMPUTE and ours[n] != theirs[n]]
        if other:
            what = ", ".join(f"{name} {theirs[name]}, here {ours[name]}" for name in other)
            raise LensError(f"{path}: an adapter of another model: {what}")
        release_lora.check(adapter, model, str(path))
        return adapter
    return lora_files.read(Path(path), model)


def read_run(path: str | Path, part: str = "ema") -> tuple[Adapter, DenoiserConfig]:
    """(the adapter of a run's newest checkpoint, the model it is for); LensError where the run trained none."""
    from lens_jax.run import store

    folder = store.find(path)
    values = store.read_metadata(folder)["config"]
    model = config_files.read(DenoiserConfig, values.get("model", {}), str(folder), "model", [])
    config = run_config(values, str(folder))
    if not config.rank:
        raise LensError(f"{path}: a run that trained a denoiser and no adapter (lora.rank 0)")
    wanted = {part: {"lora": lora.abstract(config, denoiser.abstract_params(model))}}
    tree = jax.tree.map(np.asarray, store.load(folder, wanted, partial=True)[part]["lora"])
    alpha = config.alpha or float(config.rank)
    return release_lora.from_tree(tree, model, alpha, base_model=str(values.get("init_from") or "")), model


def run_config(values, where: str) -> LoraConfig:
    """What a run's config says of its adapter; those from before there were any say nothing."""
    return config_files.read(LoraConfig, values.get("lora", {}), where, "lora", [])


def place(adapter: Adapter, model: DenoiserConfig, mesh: Mesh | None) -> dict:
    """The tree of an adapter on devices, float32; on a mesh laid out as `parallel.LORA_RULES` say."""
    tree = release_lora.to_tree(adapter, model) if adapter.factors else {}
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, tree)
    places = parallel.shardings(mesh, parallel.tree_specs(parallel.LORA_RULES, tree, mesh))
    make = lambda x, where: jax.make_array_from_callback(x.shape, where, lambda index: x[index])
    return jax.tree.map(make, tree, places)


def joined(adapters: list[Loaded], mesh: Mesh | None) -> dict | None:
    """One tree that adds what all of them add, with their scales in it; None for none."""
    trees = [loaded.tree for loaded in adapters if loaded.tree]
    if not trees:
        return None
    scales = [np.float32(loaded.scale) for loaded in adapters if loaded.tree]
    return parallel.on(mesh, _joined)(trees, scales)


@jax.jit
def _joined(trees: list[dict], scales: list[jax.Array]) -> dict:
    return lora.joined([lora.scaled(tree, scale) for tree, scale in zip(trees, scales)])


def merge(params: dict, tree: dict | None, mesh: Mesh | None) -> dict:
    """The parameters with a tree of `joined` in their kernels; those that change are new arrays."""
    flat = flatten_dict(params, sep="/")
    paths = sorted({path.rpartition("/")[0] for path in flatten_dict(tree or {}, sep="/")})
    for path in paths:
        # One at a time: the largest leaf of the released model is 1.2 GB, and twice that in float32.
        one = lambda part: unflatten_dict(part, sep="/")
        kernel = {f"{path}/kernel": flat[f"{path}/kernel"]}
        change = {f"{path}/{name}": flatten_dict(tree, sep="/")[f"{path}/{name}"] for name in "ab"}
        flat |= flatten_dict(parallel.on(mesh, _merged)(one(kernel), one(change)), sep="/")
    return unflatten_dict(flat, sep="/")


_merged = jax.jit(lora.merged)


def add_full(params: dict, adapter: Adapter, model: DenoiserConfig, scale: float, mesh: Mesh | None) -> dict:
    """The parameters with changes of full rank (LoKr), which have no other form, in their kernels."""
    flat, changes = flatten_dict(params, sep="/"), release_lora.full_changes(adapter, model)
    for path in changes:
        kernel, change = flat[path], changes[path]
        where = None if mesh is None else kernel.sharding
        whole = change if where is None else jax.make_array_from_callback(change.shape, where, lambda i, c=change: c[i])
        flat[path] = parallel.on(mesh, _added)(kernel, whole, np.float32(scale))
    return unflatten_dict(flat, sep="/")


@jax.jit
def _added(kernel: jax.Array, change: jax.Array, scale: jax.Array) -> jax.Array:
    return (kernel.astype("float32") + scale * change).astype(kernel.dtype)
