"""`lens-jax plan` of a distillation: what three networks need of a device, and what a global step of them costs."""

import dataclasses
from typing import Annotated, Any

import tyro
from rich.console import Console

from lens_jax.atomic import write_json
from lens_jax.console import make_console
from lens_jax.errors import LensError
from lens_jax.models.lora import LoraConfig
from lens_jax.planning import distill, fit, lowering
from lens_jax.planning.data import CAPTION_TOKENS, largest_shapes
from lens_jax.planning.distill import Volume
from lens_jax.planning.hardware import HARDWARE
from lens_jax.planning.options import DeviceOptions, make_table
from lens_jax.posttraining.distill_config import DistillConfig

# The adapter that is proposed where nothing else fits; that of configs/distill_lens_lora.py.
_ADAPTER = LoraConfig(rank=64, alpha=64, targets=("attention", "mlp"))


@dataclasses.dataclass(frozen=True)
class DistillPlanConfig(DeviceOptions):
    """Memory, operations, time and cost of a distillation on so many devices."""

    # The run itself; its fields are options as in `lens-jax distill`.
    config: Annotated[DistillConfig, tyro.conf.arg(name="")]
    # Text tokens a caption has on average, not counting those that stand behind every caption.
    caption_tokens: int = CAPTION_TOKENS

    def __post_init__(self):
        super().__post_init__()
        self.at_least(caption_tokens=0)


@dataclasses.dataclass(frozen=True)
class DistillPlan:
    """Everything that was found out."""

    hardware: str
    devices: int
    mesh: dict[str, int]
    # What the batches are.
    data: str
    # Bytes on one device throughout, those of each program besides, and what the host keeps for it.
    resident: dict[str, int]
    programs: dict[str, int]
    host: int
    usable: float
    remat: str
    # Attention kernel of each program that was lowered and has one.
    kernels: dict[str, str]
    volume: Volume
    # Of one global step.
    seconds: float
    hours: float
    device_hours: float
    cost: float | None

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + max(self.programs.values())


def plan(options: DistillPlanConfig, console: Console | None = None) -> DistillPlan:
    """Print the plan, write it where `--json` says; LensError with what to change where it does not fit."""
    console = console or make_console()
    with console.status("tracing"):
        found = make_plan(options)
    show(found, options, console)
    if options.json:
        write_json(options.json, as_json(found, options))
    if found.peak > found.usable:
        with console.status("looking for what fits"):
            problem = _does_not_fit(found, options)
        raise LensError(problem)
    return found


def make_plan(options: DistillPlanConfig) -> DistillPlan:
    """Trace everything and add it up."""
    hardware = HARDWARE[options.hardware]
    config = options.config
    mesh = lowering.abstract_mesh(config.mesh, options.devices)
    data = distill.uses(config, options.caption_tokens)
    distill.check_shapes(config, data, mesh)
    config = distill.choose_remat(config, mesh, hardware.platform, hardware.usable)
    config = lowering.on_platform(config, hardware.platform)
    programs, kernels = {}, {}
    shapes = largest_shapes(data.buckets)
    for use in shapes:
        traced = distill.trace(config, mesh, use)
        of_shape = f" of {use.bucket}" if len(shapes) > 1 else ""
        for name, peak in distill.peaks(traced, hardware.platform).items():
            programs[name + of_shape] = peak.bytes
        for name, one in traced.items() if options.lower else ():
            kernel = lowering.lower(name, one, mesh, hardware.platform).kernel
            if not name.endswith("update"):
                kernels[name + of_shape] = kernel or "xla"
    volume = distill.volume(config, data)
    seconds = volume.operations / (options.mfu * options.devices * hardware.peak)
    hours = config.steps * seconds / 3600
    return DistillPlan(
        hardware=options.hardware,
        devices=options.devices,
        mesh={} if mesh is None else dict(mesh.shape),
        data=data.source,
        resident=distill.resident(config, mesh, data),
        programs=programs,
        host=distill.host_bytes(config, mesh),
        usable=hardware.usable,
        remat=config.model.remat,
        kernels=kernels,
        volume=volume,
        seconds=seconds,
        hours=hours,
        device_hours=hours * options.devices,
        cost=hours * options.devices * options.price or None,
    )


def _does_not_fit(found: DistillPlan, options: DistillPlanConfig) -> str:
    """One line: how much is missing, what takes most, and what would fit."""
    hardware = HARDWARE[options.hardware]
    kinds = {**found.resident, max(found.programs, key=found.programs.get): max(found.programs.values())}
    most = max(kinds, key=kinds.get)
    problem = (
        f"{found.peak / 1e9:.1f} GB a device do not fit into the {found.usable / 1e9:.1f} GB of {options.hardware} "
        f"(most is {most}, {kinds[most] / 1e9:.1f} GB); "
    )

    def peak_bytes(config: DistillConfig) -> int:
        mesh = lowering.abstract_mesh(config.mesh, options.devices)
        data = distill.uses(config, options.caption_tokens)
        distill.check_shapes(config, data, mesh)
        return distill.peak_bytes(config, mesh, data, hardware.platform, found.usable)

    config = fit.with_remat(options.config, found.remat)
    change = fit.first_that_fits(config, options.devices, hardware.domain, peak_bytes, found.usable)
    if change is None and not config.lora.rank:
        size = peak_bytes(dataclasses.replace(config, lora=_ADAPTER))
        if size <= found.usable:
            change = (
                f"adapters beside one frozen base would ({size / 1e9:.1f} GB): --lora.rank {_ADAPTER.rank} "
                f"--lora.alpha {_ADAPTER.alpha:g}, as configs/distill_lens_lora.py"
            )
    return problem + (change or f"nothing less than more devices would: --devices {2 * options.devices}")


def show(found: DistillPlan, options: DistillPlanConfig, console: Console) -> None:
    """The plan as tables."""
    config, volume = options.config, found.volume
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items() if size > 1) or "one device"
    trained = f"adapters of rank {config.lora.rank}" if config.lora.rank else "all parameters"
    console.print(f"{config.out} on {found.devices} {found.hardware}: {mesh}; {trained}; {found.data}", markup=False)
    table = make_table(f"Memory of a device, {found.usable / 1e9:.1f} GB usable", "throughout", "GB")
    for kind, size in found.resident.items():
        if size:
            table.add_row(kind, f"{size / 1e9:.3f}")
    table.add_section()
    for name, size in found.programs.items():
        table.add_row(f"{name}, {found.kernels.get(name, '')}".rstrip(", "), f"{size / 1e9:.3f}")
    table.add_section()
    table.add_row("in all", f"{found.peak / 1e9:.2f}")
    if found.host:
        table.add_row("in the host's memory: average, moments", f"{found.host / 1e9:.2f}")
    console.print(table)
    updates = config.fake.updates
    table = make_table("Work and time", f"one global step ({updates} + 1 updates)", "")
    table.add_row("samples of the student", f"{volume.images:,.0f}")
    table.add_row("passes of a denoiser a sample, all updates (a backward one is two)", f"{volume.passes:.1f}")
    table.add_row(f"operations of fake score and discriminator, {updates} updates", f"{volume.fake:.4g}")
    table.add_row("of the student, and of what pulls it", f"{volume.student:.4g}")
    table.add_row(f"of recomputation (remat {found.remat})", f"{volume.recomputation:.4g}")
    table.add_row("of encoding images and captions", f"{volume.encoders:.4g}")
    table.add_row(f"seconds at {options.mfu:.0%} of the peak", f"{found.seconds:,.2f}")
    table.add_section()
    table.add_row(f"{config.steps:,} global steps: hours", f"{found.hours:,.2f}")
    table.add_row("device-hours", f"{found.device_hours:,.1f}")
    if found.cost is not None:
        table.add_row("cost", f"{found.cost:,.0f}")
    console.print(table)


def as_json(found: DistillPlan, options: DistillPlanConfig) -> dict[str, Any]:
    """The plan as plain values, with the options it was made with (the run's config apart)."""
    values = dataclasses.asdict(found)
    return {"options": options.chosen(), "peak_bytes": found.peak, "fits": found.peak <= found.usable, **values}
