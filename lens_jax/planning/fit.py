"""What fits into the memory of a run's devices: how much is computed again, and what to change where nothing does."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AbstractMesh

from lens_jax import parallel
from lens_jax.errors import LensError
from lens_jax.models.denoiser import KEPT
from lens_jax.parallel import AXES, MeshConfig
from lens_jax.planning import estimate, lowering
from lens_jax.planning.data import DataUse, data_use
from lens_jax.pretraining.config import TrainConfig

# Share of a device's memory up to which an estimate is trusted to fit.
FULL = 0.9


def choose_remat(
    config: TrainConfig, mesh: AbstractMesh | None, data: DataUse, platform: lowering.Platform, usable: float
) -> TrainConfig:
    """The config with the remat that computes least again and fits into `usable` bytes, where it is left to us.

    `full` where none is estimated to fit.
    """
    if config.model.remat != "auto":
        return config
    for remat in KEPT:
        chosen = with_remat(config, remat)
        if remat == "full" or estimate.peak_bytes(chosen, mesh, data, platform, usable) <= FULL * usable:
            break
    return chosen


def with_remat(config: TrainConfig, remat: str) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))


def choose_remat_on(
    config: TrainConfig, mesh: AbstractMesh | None, platform: lowering.Platform, usable: float
) -> TrainConfig:
    """As `choose_remat`, for the batches of the run's data."""
    data = data_use(config, 1 if mesh is None else mesh.shape["sequence"])
    return choose_remat(config, mesh, data, platform, usable)


def choose_remat_here(config: TrainConfig, choose: Callable = choose_remat_on) -> TrainConfig:
    """The same for the devices of this run. The first process chooses for all; a run that goes on keeps what it had.

    Devices that do not say how much memory they have, CPUs among them, compute nothing again. `choose` is for runs of
    other kinds (`planning.rl`).
    """
    if config.model.remat != "auto":
        return config
    order = list(KEPT)
    chosen = order.index(_fits_here(config, choose)) if jax.process_index() == 0 else 0
    return with_remat(config, order[int(parallel.of_first_process(np.int32(chosen)))])


def _fits_here(config: TrainConfig, choose: Callable) -> str:
    if (earlier := Path(config.out) / "config.json").is_file():
        try:
            if (remat := json.loads(earlier.read_text())["model"]["remat"]) in KEPT:
                return remat
        except (ValueError, KeyError, TypeError):
            # Whoever reads the run says what is wrong with it.
            pass
    usable = min((device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices())
    if not usable:
        return "none"
    mesh = lowering.abstract_mesh(config.mesh, jax.device_count())
    platform = "tpu" if jax.default_backend() == "tpu" else "cuda"
    return choose(config, mesh, platform, usable).model.remat


def first_that_fits(
    config: TrainConfig, devices: int, domain: int, peak_bytes: Callable[[TrainConfig], int], usable: float
) -> str | None:
    """One change, or a few at once, after which the run fits, and to how much it then comes; None if none does."""
    for changes, changed in _alternatives(config, devices, domain):
        try:
            size = peak_bytes(changed)
        except LensError:
            # A batch or the heads cannot be split that way.
            continue
        if size <= usable:
            return f"{' and '.join(changes)} would ({size / 1e9:.1f} GB)"
    return None


def _alternatives(config: TrainConfig, devices: int, domain: int) -> Iterator[tuple[list[str], TrainConfig]]:
    """Changes one by one from the cheapest on, then together."""
    wider = list(_wider(config, devices))
    yield from (([text], changed) for text, changed in wider)
    lighter = list(_lighter(config))
    yield from (([text], changed) for text, changed in lighter)
    yield from (([text], changed) for text, changed in _offloaded(config))
    smaller = list(_smaller(config))
    yield from (([text], changed) for text, changed in smaller)
    yield from (([text], changed) for text, changed in _tensor(config, devices, domain))
    # All at once, the batch last.
    texts, best = [], config
    for step in (lambda c: list(_wider(c, devices))[-1:], lambda c: list(_lighter(c))[-1:], _offloaded):
        for text, changed in step(best):
            texts, best = [*texts, text], changed
    if len(texts) > 1:
        yield texts, best
    for text, changed in _smaller(best):
        yield [*texts, text], changed


def _wider(config: TrainConfig, devices: int) -> Iterator[tuple[str, TrainConfig]]:
    """More devices along `fsdp`, fewer along `data`."""
    data, fsdp, tensor, sequence = config.mesh.sizes(devices)
    factor = 2
    while data % factor == 0:
        mesh = _resized(config, data // factor, fsdp * factor, tensor, sequence)
        yield (
            f"mesh.fsdp {fsdp} -> {fsdp * factor}{_with_data(config, data // factor)}",
            dataclasses.replace(config, mesh=mesh),
        )
        factor *= 2


def _resized(config: TrainConfig, *sizes: int) -> MeshConfig:
    return dataclasses.replace(config.mesh, **dict(zip(AXES, sizes)))


def _with_data(config: TrainConfig, data: int) -> str:
    """How `mesh.data` has to follow, where it is not what is left."""
    return "" if config.mesh.data in (-1, data) else f", mesh.data {config.mesh.data} -> {data},"


def _lighter(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """More recomputation, the least first."""
    order = list(KEPT)
    for remat in order[order.index(config.model.remat) + 1 :]:
        yield f"model.remat {config.model.remat} -> {remat}", with_remat(config, remat)


def _offloaded(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """Average and moments in the host's memory."""
    if not config.offload:
        yield "offload False -> True", dataclasses.replace(config, offload=True)


def _smaller(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """Smaller batches and more of them, so that an update stays as large."""
    data, factor = config.data, 2
    sizes = data.batch_sizes or (data.batch_size,)
    while all(size % factor == 0 for size in sizes):
        smaller = tuple(size // factor for size in sizes)
        if data.batch_sizes:
            field, changed = "data.batch_sizes", dataclasses.replace(data, batch_sizes=smaller)
            old, new = (" ".join(map(str, values)) for values in (sizes, smaller))
        else:
            field, changed = "data.batch_size", dataclasses.replace(data, batch_size=smaller[0])
            old, new = sizes[0], smaller[0]
        accumulation = config.accumulation * factor
        text = f"{field} {old} -> {new} with accumulation {config.accumulation} -> {accumulation}"
        yield text, dataclasses.replace(config, data=changed, accumulation=accumulation)
        factor *= 2


def _tensor(config: TrainConfig, devices: int, domain: int) -> Iterator[tuple[str, TrainConfig]]:
    """Heads and MLPs sharded within a fast network: also the activations inside a block get smaller."""
    data, fsdp, tensor, sequence = config.mesh.sizes(devices)
    for factor in (2, 4):
        if tensor * factor * sequence > domain:
            return
        if data % factor == 0:
            mesh = _resized(config, data // factor, fsdp, tensor * factor, sequence)
            text = f"mesh.tensor {tensor} -> {tensor * factor}{_with_data(config, data // factor)}"
            yield text, dataclasses.replace(config, mesh=mesh)
