"""What distillation starts from: a run, a release or a packed model, with an adapter merged into it or none."""

import dataclasses
from collections.abc import Callable

from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from lens_jax import parallel
from lens_jax.convert.lora import Adapter
from lens_jax.errors import LensError
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.lora import OFF
from lens_jax.posttraining import adapters
from lens_jax.posttraining.distill_config import DistillConfig
from lens_jax.pretraining import warm_start
from lens_jax.pretraining.config import TrainConfig
from lens_jax.run.state import Tree


def load(
    config: DistillConfig | TrainConfig, teacher_lora: str, mesh: Mesh | None, say: Callable[[str], None] = print
) -> tuple[Tree, Tree | None]:
    """(the teacher's parameters, those of the codec where `init_from` has fitting ones).

    float32, or beside adapters of the student in the dtype that they are computed in. LensError for what is not there
    or of another model.

    config: where it is and of what model; with `lora` of the student. teacher_lora: an adapter, or empty.
    """
    if not teacher_lora:
        params, fitted = warm_start.load(config, mesh, say)
        return unflatten_dict(params, sep="/"), fitted
    adapter = _adapter(teacher_lora, config.model)
    # In float32, so that the sum is rounded once.
    params, fitted = warm_start.load(dataclasses.replace(config, lora=OFF), mesh, say)
    tree = _merged(unflatten_dict(params, sep="/"), adapter, config.model, mesh)
    if config.lora.rank:
        tree = parallel.on(mesh, warm_start.cast_program)(tree, config.model.dtype)
    return tree, fitted


def check(config: DistillConfig) -> None:
    """LensError for a teacher that is not named, or whose adapter is not there or for another denoiser."""
    if not config.init_from:
        raise LensError(f"init_from names no teacher; accepted: {warm_start.ACCEPTED}")
    if config.teacher_lora:
        _adapter(config.teacher_lora, config.model)


def _adapter(path: str, model: DenoiserConfig) -> Adapter:
    try:
        return adapters.read(path, model)
    except LensError as error:
        raise LensError(f"teacher_lora: {error}") from None


def _merged(params: Tree, adapter: Adapter, model: DenoiserConfig, mesh: Mesh | None) -> Tree:
    """Parameters with an adapter in their kernels."""
    if adapter.factors:
        loaded = adapters.Loaded(adapters.place(adapter, model, mesh), adapter.scale)
        params = adapters.merge(params, adapters.joined([loaded], mesh), mesh)
    return adapters.add_full(params, adapter, model, 1.0, mesh) if adapter.kroneckers else params
