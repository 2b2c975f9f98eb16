"""Memory, work, traffic and time of one optimiser step, from shapes and traced programs alone."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import jax

from lens_jax import flops, parallel
from lens_jax.errors import LensError
from lens_jax.planning import communication, lowering, memory, program
from lens_jax.planning.communication import Collective
from lens_jax.planning.data import BucketUse, DataUse, largest_shapes
from lens_jax.planning.hardware import Hardware
from lens_jax.planning.lowering import Lowered
from lens_jax.pretraining import features
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.recipe import abstract_state
from lens_jax.run.state import State


@dataclasses.dataclass(frozen=True)
class TracedProgram:
    """One program of a step, as traced."""

    name: str
    use: BucketUse
    peak: memory.Peak
    collectives: list[Collective]
    lowered: Lowered | None


def trace_programs(
    config: TrainConfig,
    mesh,
    uses: Iterable[BucketUse],
    cached: bool,
    platform: lowering.Platform,
    lower: bool,
    compile: bool = False,
    advance: Callable[[str], None] = lambda what: None,
) -> list[TracedProgram]:
    """Every program that a step runs, for every shape of `uses`; the update once.

    With `compile` what they need is what the compiler of the mesh's devices says, not an estimate. `advance` is told
    what is begun.
    """
    config = lowering.on_platform(config, platform)
    state = _abstract_state(config, mesh)
    found: list[TracedProgram] = []
    for use in uses:
        advance(f"tracing {use.bucket}")
        traced = lowering.trace(config, mesh, state, use.images, use.tokens)
        if not cached:
            traced |= lowering.trace_encoders(config, mesh, use.images, use.tokens, use.bucket)
        for name, one in traced.items():
            if name == "update" and any(other.name == "update" for other in found):
                continue
            advance(
                f"{'compiling' if compile else 'lowering'} the {name} of {use.bucket}"
                if lower
                else f"reading the {name}"
            )
            read = program.read(one.jaxpr)
            lowered = lowering.lower(name, one, mesh, platform, compile) if lower else None
            peak = memory.peak(read, platform)
            if compile:
                peak = memory.Peak({"as compiled": lowered.compiled_bytes}, peak.scope)
            found.append(TracedProgram(name, use, peak, communication.collectives(read), lowered))
    return found


def _abstract_state(config: TrainConfig, mesh) -> State:
    # Without a mesh the memory of the host would be that of this machine.
    return abstract_state(config, mesh, offload=config.offload and mesh is not None)


def peak_bytes(config: TrainConfig, mesh, data: DataUse, platform: lowering.Platform, usable: float) -> int:
    """The most that one device holds. More than `usable` without the programs, they are not traced."""
    shapes = largest_shapes(data.buckets)
    throughout = sum(resident(config, mesh, shapes, data.cached).values())
    if throughout > usable:
        return throughout
    programs = trace_programs(config, mesh, shapes, data.cached, platform, lower=False)
    return throughout + max(one.peak.bytes for one in programs)


def count_parts(config: TrainConfig, uses: Sequence[BucketUse], cached: bool) -> int:
    """How often `trace_programs` calls its `advance`."""
    encoders = 0 if cached else 2
    return len(uses) * (2 + encoders) + (config.accumulation > 1)


def resident(config: TrainConfig, mesh, uses: Iterable[BucketUse], cached: bool) -> dict[str, int]:
    """Bytes on one device of what is there throughout, by kind, from the layouts that the run gives them."""
    state = _abstract_state(config, mesh)
    kinds = {
        "parameters": bytes_of(state.params),
        "frozen parameters": bytes_of(state.frozen.get("denoiser", {})),
        "average": 0 if config.offload else bytes_of(state.ema),
        "optimiser": 0 if config.offload else bytes_of(state.opt_state),
        "accumulated gradients": bytes_of(state.params, itemsize=4) if config.accumulation > 1 else 0,
        "autoencoder": 0,
        "text encoder": 0,
    }
    if not cached:
        kinds["autoencoder"] = bytes_of(config.codec.abstract_params(mesh))
        kinds["text encoder"] = bytes_of(config.text.abstract_params(mesh))
    inputs = []
    for use in uses:
        batch = features.abstract_batch(config, use.images, use.tokens, mesh)
        pixels = 0 if cached else bytes_of(lowering.abstract_pixels(use.images, use.bucket, mesh))
        inputs.append(bytes_of(batch) + pixels)
    # One is being worked on while the next is already sent to the devices.
    kinds["batches"] = 2 * max(inputs)
    return kinds


def offloaded(config: TrainConfig, mesh) -> int:
    """Bytes that the host keeps for each of its devices."""
    state = _abstract_state(config, mesh)
    return bytes_of((state.ema, state.opt_state)) if config.offload else 0


def bytes_of(tree, itemsize: int | None = None) -> int:
    """Bytes of abstract arrays on one device; `itemsize` in place of their own dtype's."""

    def one(leaf) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * (itemsize or leaf.dtype.itemsize)

    return sum(map(one, jax.tree.leaves(tree)))


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations of one optimiser step over all devices."""

    # Of the trained network on tokens that mean something.
    model: float
    # What the devices are given to do for it: padding and recomputation too.
    executed: float
    # Of the frozen networks.
    encoders: float
    # Images.
    images: float


def work(config: TrainConfig, use: BucketUse, cached: bool) -> Work:
    """Of one batch of a shape. Captions are dropped with the configured probability, as the run's own MFU counts."""
    model, images, tokens = config.model, use.images, use.tokens
    dropped, caption_tokens = config.flow.caption_dropout, round(use.text)
    count = lambda text: flops.train_step(model, tokens.image, text, images, config.lora)
    executed = flops.train_step(model, tokens.padded, tokens.text, images, config.lora)
    executed += flops.recomputation(model, tokens.padded, tokens.text, images)
    encoders = 0
    if not cached:
        encoders = images * (config.codec.operations(tokens.grid) + config.text.operations(caption_tokens))
    return Work((1 - dropped) * count(caption_tokens) + dropped * count(0), executed, encoders, images)


def step_work(config: TrainConfig, data: DataUse) -> Work:
    """Of one optimiser step on average."""
    parts = [(config.accumulation * use.share, work(config, use, data.cached)) for use in data.buckets]
    total = lambda name: sum(weight * getattr(part, name) for weight, part in parts)
    return Work(*(total(field.name) for field in dataclasses.fields(Work)))


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device sends in one optimiser step, of one kind."""

    what: str
    kind: str
    axes: str
    bytes: float
    # At the stated bandwidths, nothing else under way.
    seconds: float


def traffic(
    config: TrainConfig, data: DataUse, programs: list[TracedProgram], mesh, hardware: Hardware
) -> list[Traffic]:
    """Of one optimiser step on average, largest first."""
    found = []
    if size := offloaded(config, mesh):
        found.append(Traffic("average, moments", "there and back", "host", 2 * size, 2 * size / hardware.host))
    if mesh is None:
        return found
    sizes = dict(mesh.shape)
    # A bucket is taken to run the program of its area's largest; without `data.pad_areas` smaller ones send a little
    # less where activations are sent.
    frequency = defaultdict(float)
    for use in data.buckets:
        frequency[use.area] += config.accumulation * use.share
    totals: dict[tuple, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for one in programs:
        times = 1 if one.name == "update" else frequency[one.use.area]
        for collective in one.collectives:
            total = totals[collective.what, collective.kind, " ".join(collective.axes)]
            total[0] += times * collective.sent(sizes)
            total[1] += times * collective.seconds(sizes, hardware)
    found += [Traffic(*key, *values) for key, values in totals.items()]
    return sorted(found, key=lambda one: -one.bytes)


def check_shapes(config: TrainConfig, data: DataUse, mesh) -> None:
    """LensError where a batch or the heads cannot be split over the mesh."""
    if mesh is None:
        return
    for use in data.buckets:
        parallel.check_batch_size(use.images, mesh)
    heads, over = config.model.heads, mesh.shape["tensor"] * mesh.shape["sequence"]
    if heads % over:
        axis = "sequence" if mesh.shape["sequence"] > 1 else "tensor"
        rest = over // mesh.shape[axis]
        best = math.gcd(heads // math.gcd(heads, rest), mesh.shape[axis])
        raise LensError(
            f"mesh.tensor {mesh.shape['tensor']} x mesh.sequence {mesh.shape['sequence']} does not divide the {heads} "
            f"heads of the model; mesh.{axis} {best} would"
        )
