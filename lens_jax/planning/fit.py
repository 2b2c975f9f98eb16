"""What to change in a run that does not fit into its devices' memory."""

import dataclasses
from collections.abc import Callable, Iterator

from lens_jax.errors import LensError
from lens_jax.parallel import AXES, MeshConfig
from lens_jax.pretraining.config import TrainConfig


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
    order = ["none", "dots", "attention", "full"]
    for remat in order[order.index(config.model.remat) + 1 :]:
        model = dataclasses.replace(config.model, remat=remat)
        yield f"model.remat {config.model.remat} -> {remat}", dataclasses.replace(config, model=model)


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
