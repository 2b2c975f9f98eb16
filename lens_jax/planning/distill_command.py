"""`lens-jax plan` of a distillation: what three networks need of a device, and what a global step of them costs."""

import dataclasses
from typing import Annotated

import tyro
from rich.console import Console

from lens_jax.models.lora import LoraConfig
from lens_jax.planning import distill, fit, lowering, memory
from lens_jax.planning.answer import Held, answer, memory_table
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
class DistillPlan(Held):
    """Everything that was found out."""

    # What the batches are.
    data: str
    volume: Volume
    # Of one global step, and of one of the warm start.
    seconds: float
    warm_start_seconds: float
    hours: float
    device_hours: float
    cost: float | None


def plan(options: DistillPlanConfig, console: Console | None = None) -> DistillPlan:
    """Print the plan, write it where `--json` says; LensError with what to change where it does not fit."""
    return answer(options, make_plan, show, _advice, console)


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
        for name, size in memory.peaks(traced, hardware.platform).items():
            programs[name + of_shape] = size
        for name, one in traced.items() if options.lower else ():
            kernel = lowering.lower(name, one, mesh, hardware.platform).kernel
            if not name.endswith("update"):
                kernels[name + of_shape] = kernel or "xla"
    volume = distill.volume(config, data)
    rate, warm = options.mfu * options.devices * hardware.peak, config.warm_start.steps
    seconds, warm_seconds = volume.operations / rate, volume.warm_start / rate
    hours = ((config.steps - warm) * seconds + warm * warm_seconds) / 3600
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
        warm_start_seconds=warm_seconds,
        hours=hours,
        device_hours=hours * options.devices,
        cost=hours * options.devices * options.price or None,
    )


def _advice(found: DistillPlan, options: DistillPlanConfig) -> str:
    """What would fit."""
    hardware = HARDWARE[options.hardware]

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
    return change or (f"nothing less than more devices would: --devices {2 * options.devices}")


def show(found: DistillPlan, options: DistillPlanConfig, console: Console) -> None:
    """The plan as tables."""
    config, volume = options.config, found.volume
    trained = f"adapters of rank {config.lora.rank}" if config.lora.rank else "all parameters"
    where = f"{found.devices} {found.hardware}: {found.described_mesh}"
    console.print(f"{config.out} on {where}; {trained}; {found.data}", markup=False)
    console.print(memory_table(found, "average, moments"))
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
    warm = config.warm_start.steps
    if warm:
        table.add_row("a step of the warm start: operations", f"{volume.warm_start:.4g}")
        table.add_row("seconds", f"{found.warm_start_seconds:,.2f}")
        table.add_section()
    of_them = f", {warm:,} of them of the warm start" if warm else ""
    table.add_row(f"{config.steps:,} global steps{of_them}: hours", f"{found.hours:,.2f}")
    table.add_row("device-hours", f"{found.device_hours:,.1f}")
    if found.cost is not None:
        table.add_row("cost", f"{found.cost:,.0f}")
    console.print(table)
