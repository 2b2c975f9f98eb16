"""The `lens-jax plan` command: what a run needs and costs on devices that nobody has paid for yet."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from lens_jax.atomic import write_json
from lens_jax.console import make_console
from lens_jax.errors import LensError
from lens_jax.planning import estimate, fit, lowering, topology
from lens_jax.planning.data import CAPTION_TOKENS, BucketUse, DataUse, Padding, data_use, largest_shapes, padding
from lens_jax.planning.estimate import TracedProgram, Traffic, Work
from lens_jax.planning.hardware import HARDWARE, Hardware
from lens_jax.planning.options import DeviceOptions, make_table
from lens_jax.pretraining.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class PlanConfig(DeviceOptions):
    """Memory, operations, traffic, time and cost of a run on so many devices, its step traced and lowered for them."""

    # The run itself; its fields are options as in `lens-jax train`.
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    # In how many slices they are (TPUs), joined by the network of the data centre.
    slices: int = 1
    # Share of the peak rate that is reached, of 1. Denoiser and frozen encoders are taken to reach the same.
    mfu: float = dataclasses.field(default=0.4, kw_only=True)
    # Text tokens a caption has on average (the report's 109 words are about 150 of GPT-OSS), not counting the 22 that
    # stand behind every caption.
    caption_tokens: int = CAPTION_TOKENS
    # Compile every program with the TPU's own compiler and take the memory that it says: up to some minutes each.
    # Needs no TPU, but the extra: tpu.
    compile: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.at_least(caption_tokens=0)
        if self.compile and not self.lower:
            raise LensError("--compile needs what --no-lower leaves out")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that was found out."""

    hardware: str
    devices: int
    # Devices along each axis; none for one device.
    mesh: dict[str, int]
    # How it lies on the devices; "" where there is nothing to say.
    layout: str
    data: str
    # Bytes on one device throughout, and those of the fullest program, by kind.
    resident: dict[str, int]
    working: dict[str, int]
    # Bytes that the host keeps for a device.
    offloaded: int
    usable: float
    programs: list[TracedProgram]
    # What the backward pass computes again, as configured or as it fits.
    remat: str
    work: Work
    # Share of the peak that counts as MFU in a run's own record: encoders take time and count for nothing there.
    mfu: float
    hfu: float
    seconds: float
    traffic: list[Traffic]
    buckets: list[Padding]
    areas: list[Padding]
    # Of all updates of the run.
    device_hours: float
    days: float
    cost: float | None

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + sum(self.working.values())

    @property
    def network_seconds(self) -> float:
        return sum(one.seconds for one in self.traffic)


def plan(options: PlanConfig, console: Console | None = None) -> Plan:
    """Print the plan, write it where `--json` says; LensError with what to change where it cannot run."""
    console = console or make_console()
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("laying out", total=None)

        def advance(what: str, of: int) -> None:
            progress.update(task, description=what, advance=1, total=of)

        found = make_plan(options, advance)
    show(found, options, console)
    if options.json:
        write_json(options.json, as_json(found, options))
    if found.peak > found.usable:
        raise LensError(_does_not_fit(found, options))
    return found


def make_plan(options: PlanConfig, advance: Callable[[str, int], None] = lambda what, of: None) -> Plan:
    """Trace everything and add it up. `advance` is told what is begun, and how many such parts there are."""
    config, hardware = options.config, HARDWARE[options.hardware]
    mesh, layout, data, shapes = _lay_out(config, options)
    config = fit.choose_remat(config, mesh, data, hardware.platform, hardware.usable)
    config = lowering.on_platform(config, hardware.platform)
    if options.compile:
        mesh = topology.slice_mesh(config.mesh, options.hardware, options.devices, options.slices)
    parts = estimate.count_parts(config, shapes, data.cached)
    begin = lambda what: advance(what, parts)
    static = hardware.platform, options.lower, options.compile
    programs = estimate.trace_programs(config, mesh, shapes, data.cached, *static, begin)
    resident = estimate.resident(config, mesh, shapes, data.cached)
    work = estimate.step_work(config, data)
    rate = options.devices * hardware.peak
    seconds = (work.model + work.encoders) / (options.mfu * rate)
    fullest = max(programs, key=lambda one: one.peak.bytes)
    hours = config.steps * seconds * options.devices / 3600
    buckets, areas = defaultdict(list), defaultdict(list)
    for use in data.buckets:
        buckets[use.bucket].append(use)
        areas[use.area].append(use)
    of_areas = [padding(config, uses, f"{len({u.bucket for u in uses})} sizes") for uses in areas.values()]
    if len(areas) > 1:
        of_areas.append(padding(config, data.buckets, "all"))
    return Plan(
        hardware=options.hardware,
        devices=options.devices,
        mesh={} if mesh is None else dict(mesh.shape),
        layout=layout,
        data=data.source,
        resident=resident,
        working=fullest.peak.kinds,
        offloaded=estimate.offloaded(config, mesh),
        usable=hardware.usable,
        programs=programs,
        remat=config.model.remat,
        work=work,
        mfu=work.model / (seconds * rate),
        hfu=work.executed / (seconds * rate),
        seconds=seconds,
        traffic=estimate.traffic(config, data, programs, mesh, hardware),
        buckets=[padding(config, uses, str(bucket)) for bucket, uses in buckets.items()],
        areas=of_areas,
        device_hours=hours,
        days=config.steps * seconds / 86400,
        cost=hours * options.price if options.price else None,
    )


def _lay_out(config: TrainConfig, options: PlanConfig) -> tuple[Any, str, DataUse, list[BucketUse]]:
    """(mesh, how it lies on the devices, data, shapes to trace); LensError where the run could not start on them."""
    described = topology.describe(options.hardware, options.devices, options.slices)
    mesh = lowering.abstract_mesh(config.mesh, options.devices)
    data = data_use(config, 1 if mesh is None else mesh.shape["sequence"], options.caption_tokens)
    estimate.check_shapes(config, data, mesh)
    sizes = sorted({use.images for use in data.buckets})
    layout = topology.check(config.mesh, described, sizes)
    return mesh, layout, data, largest_shapes(data.buckets)


def _does_not_fit(found: Plan, options: PlanConfig) -> str:
    """One line: how much is missing, what takes most, and what would fit."""
    hardware = HARDWARE[options.hardware]
    kinds = {**found.resident, **found.working}
    most = max(kinds, key=kinds.get)
    fullest = max(found.programs, key=lambda one: one.peak.bytes)
    problem = (
        f"{found.peak / 1e9:.1f} GB a device do not fit into the {found.usable / 1e9:.1f} GB of {options.hardware} "
        f"({fullest.name} of {fullest.use.bucket}; most is {most}, {kinds[most] / 1e9:.1f} GB); "
    )

    def peak_bytes(config: TrainConfig) -> int:
        mesh, _, data, _ = _lay_out(config, options)
        return estimate.peak_bytes(config, mesh, data, hardware.platform, found.usable)

    config = fit.with_remat(options.config, found.remat)
    change = fit.first_that_fits(config, options.devices, hardware.domain, peak_bytes, found.usable)
    return problem + (change or f"nothing less than more devices would: --devices {2 * options.devices}")


def show(found: Plan, options: PlanConfig, console: Console) -> None:
    """The plan as tables."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items() if size > 1) or "one device"
    console.print(f"{options.config.out} on {found.devices} {found.hardware}: {mesh}; {found.data}")
    if found.layout:
        console.print(found.layout)
    console.print(_memory_table(found))
    console.print(_program_table(found))
    console.print(_time_table(found, options))
    if found.traffic:
        console.print(_traffic_table(found, HARDWARE[options.hardware]))
    console.print(_padding_table(found))


def _memory_table(found: Plan) -> Table:
    fullest = max(found.programs, key=lambda one: one.peak.bytes)
    table = make_table(f"Memory of a device, {found.usable / 1e9:.1f} GB usable", "throughout", "GB")
    for kind, size in found.resident.items():
        if size:
            table.add_row(kind, f"{size / 1e9:.2f}")
    table.add_section()
    table.add_row(f"at the peak, in the {fullest.name} of {fullest.use.bucket}", "")
    for kind, size in sorted(found.working.items(), key=lambda pair: -pair[1]):
        table.add_row(kind, f"{size / 1e9:.2f}")
    table.add_section()
    table.add_row("in all", f"{found.peak / 1e9:.2f}")
    if found.offloaded:
        table.add_row("in the host's memory: average, moments", f"{found.offloaded / 1e9:.2f}")
    return table


def _program_table(found: Plan) -> Table:
    table = make_table("Programs", "program", "images", "image", "text", "peak GB", "attention", "lowered",
                   "compiled")  # fmt: skip
    for one in found.programs:
        kernel, lowered = (one.lowered.kernel or "", f"{one.lowered.seconds:.1f} s") if one.lowered else ("", "no")
        compiled = f"{one.lowered.compile_seconds:.0f} s" if one.lowered and one.lowered.compile_seconds else "no"
        shape = one.use.images, one.use.tokens.padded, one.use.tokens.text
        shown = ("", "", "") if one.name == "update" else (f"{number:,}" for number in shape)
        table.add_row(one.name, *shown, f"{one.peak.bytes / 1e9:.2f}", kernel, lowered, compiled)
    return table


def _time_table(found: Plan, options: PlanConfig) -> Table:
    work, steps = found.work, options.config.steps
    table = make_table("Work and time", "one update", "")
    table.add_row("images", f"{work.images:,.0f}")
    counted = "of the adapter's step" if options.config.lora.rank else "3 x forward"
    table.add_row(f"model operations ({counted}, real tokens)", f"{work.model:.4g}")
    table.add_row("executed ones (padding, recomputation)", f"{work.executed:.4g}")
    table.add_row("operations of frozen encoders", f"{work.encoders:.4g}")
    table.add_row(f"seconds at {options.mfu:.0%} of the peak", f"{found.seconds:.3f}")
    table.add_row(f"MFU as the run will report it, HFU (remat {found.remat})", f"{found.mfu:.1%}, {found.hfu:.1%}")
    table.add_row("images a second", f"{work.images / found.seconds:,.1f}")
    if found.traffic:
        table.add_row("seconds of the network, if nothing hid it", f"{found.network_seconds:.3f}")
    table.add_section()
    table.add_row(f"{steps:,} updates: days", f"{found.days:,.2f}")
    table.add_row("device-hours", f"{found.device_hours:,.0f}")
    if found.cost is not None:
        table.add_row(f"cost at {options.price:g} a device-hour", f"{found.cost:,.0f}")
    return table


def _traffic_table(found: Plan, hardware: Hardware) -> Table:
    title = f"Sent by a device in an update, {hardware.fast / 1e9:.0f} GB/s near and {hardware.slow / 1e9:.1f} far"
    table = make_table(title, "what", "collective", "over", "GB", "seconds")
    for one in found.traffic:
        if one.bytes > 1e-4 * found.traffic[0].bytes:
            table.add_row(one.what, one.kind, one.axes, f"{one.bytes / 1e9:.3f}", f"{one.seconds:.4f}")
    return table


def _padding_table(found: Plan) -> Table:
    table = make_table("Padding: tokens, and shares of them that mean nothing", "bucket", "batches", "images", "image",
                   "padded", "text", "of image", "of text", "of both")  # fmt: skip
    for group in (found.buckets, found.areas if len(found.buckets) > 1 else []):
        for one in group:
            tokens = (f"{number:,.0f}" for number in (one.images, one.image_tokens, one.padded_tokens, one.text_slots))
            wasted = (f"{share:.1%}" for share in (one.image_waste, one.text_waste, one.waste))
            table.add_row(one.name, f"{one.share:.1%}", *tokens, *wasted)
        table.add_section()
    return table


def as_json(found: Plan, options: PlanConfig) -> dict[str, Any]:
    """The plan as plain values, with the options it was made with (the run's config apart)."""
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    values["programs"] = [
        {
            "name": one.name,
            "bucket": str(one.use.bucket),
            "images": one.use.images,
            "image_tokens": one.use.tokens.padded,
            "text_slots": one.use.tokens.text,
            "bytes": one.peak.kinds,
            "kernel": one.lowered and one.lowered.kernel,
            "lowering_seconds": one.lowered and round(one.lowered.seconds, 2),
            "compile_seconds": one.lowered and one.lowered.compile_seconds and round(one.lowered.compile_seconds, 2),
        }
        for one in found.programs
    ]
    plain = lambda x: dataclasses.asdict(x) if dataclasses.is_dataclass(x) else x
    values = {
        name: [plain(x) for x in value] if isinstance(value, list) else plain(value) for name, value in values.items()
    }
    return {"options": options.chosen(), "peak_bytes": found.peak, "fits": found.peak <= found.usable, **values}
