"""`lens-jax plan` of a run of reinforcement learning: what it needs, draws, asks and costs."""

import dataclasses
from typing import Annotated

import tyro
from rich.console import Console

from lens_jax import parallel
from lens_jax.planning import lowering, memory, rl
from lens_jax.planning.answer import Held, answer, memory_table
from lens_jax.planning.hardware import HARDWARE
from lens_jax.planning.options import DeviceOptions, make_table
from lens_jax.planning.rl import Volume
from lens_jax.posttraining import rl_recipe as recipe
from lens_jax.posttraining.rl_config import RlConfig


@dataclasses.dataclass(frozen=True)
class RlPlanConfig(DeviceOptions):
    """Memory, operations, questions to judges, time and cost of reinforcement learning on so many devices."""

    # The run itself; its fields are options as in `lens-jax rl`.
    config: Annotated[RlConfig, tyro.conf.arg(name="")]
    # Price of a question to a judge, in the same currency.
    price_per_call: float = 0.0
    # Text tokens a prompt has on average, and the longest one, with what stands behind every prompt.
    prompt_tokens: int = rl.PROMPT_TOKENS
    longest_prompt: int = rl.LONGEST_PROMPT
    # Rubrics of a prompt.
    rubrics: int = rl.RUBRICS

    def __post_init__(self):
        super().__post_init__()
        self.at_least(price_per_call=0, prompt_tokens=0, longest_prompt=1, rubrics=1)


@dataclasses.dataclass(frozen=True)
class RlPlan(Held):
    """Everything that was found out."""

    # Batches that are drawn in an epoch, noise levels that an image is trained at, updates.
    chunks: int
    levels: int
    updates: int
    volume: Volume
    # Of one optimiser step.
    seconds: float
    # Questions a second while images are drawn, for the judge not to be waited for.
    judge_rate: float
    hours: float
    device_hours: float
    judge_calls: float
    cost: float | None


def plan(options: RlPlanConfig, console: Console | None = None) -> RlPlan:
    """Print the plan, write it where `--json` says; LensError where it does not fit."""
    return answer(options, make_plan, show, _advice, console)


def make_plan(options: RlPlanConfig) -> RlPlan:
    """Trace everything and add it up."""
    config, hardware = options.config, HARDWARE[options.hardware]
    mesh = lowering.abstract_mesh(config.mesh, options.devices)
    if mesh is not None:
        parallel.check_batch_size(config.rollout.batch_size, mesh)
    config = rl.choose_remat(config, mesh, hardware.platform, hardware.usable)
    config = lowering.on_platform(config, hardware.platform)
    sizes = rl.sizes_of(config, options.longest_prompt)
    traced = rl.trace(config, mesh, sizes)
    kernels = {}
    for name, one in traced.items() if options.lower else ():
        lowered = lowering.lower(name, one, mesh, hardware.platform)
        if lowered.kernel:
            kernels[name] = lowered.kernel
    volume = rl.volume(config, sizes, options.prompt_tokens, options.rubrics)
    rate = options.mfu * options.devices * hardware.peak
    seconds = volume.operations / rate
    hours, calls = config.steps * seconds / 3600, config.steps * volume.judge_calls
    cost = hours * options.devices * options.price + calls * options.price_per_call
    turns = recipe.turns(config)
    return RlPlan(
        hardware=options.hardware,
        devices=options.devices,
        mesh={} if mesh is None else dict(mesh.shape),
        resident=rl.resident(config, mesh),
        programs=memory.peaks(traced, hardware.platform),
        host=rl.host_bytes(config, sizes, options.devices),
        usable=hardware.usable,
        remat=config.model.remat,
        kernels=kernels,
        chunks=turns.chunks,
        levels=turns.levels,
        updates=turns.updates,
        volume=volume,
        seconds=seconds,
        judge_rate=volume.judge_calls / (volume.drawing / rate),
        hours=hours,
        device_hours=hours * options.devices,
        judge_calls=calls,
        cost=cost or None,
    )


def _advice(found: RlPlan, options: RlPlanConfig) -> str:
    """What would need less."""
    return f"a smaller rollout.batch_size, a larger mesh.fsdp or --devices {2 * options.devices} would need less"


def show(found: RlPlan, options: RlPlanConfig, console: Console) -> None:
    """The plan as tables."""
    config, volume = options.config, found.volume
    groups = f"{config.rollout.groups} groups of {config.rollout.images} images"
    where = f"{found.devices} {found.hardware}: {found.described_mesh}"
    console.print(f"{config.out} on {where}; {config.algorithm}, {groups}", markup=False)
    console.print(memory_table(found, "latents"))
    table = make_table("Work and time", "one optimiser step", "")
    table.add_row("images", f"{volume.images:,.0f}")
    table.add_row("questions to judges", f"{volume.judge_calls:,.0f}")
    table.add_row(f"operations of drawing ({config.rollout.num_inference_steps} steps)", f"{volume.drawing:.4g}")
    policies = 1 + (not recipe.on_policy(config)) + (recipe.kl(config) > 0)
    table.add_row(f"of training (noise levels {found.levels}, policies {policies})", f"{volume.training:.4g}")
    table.add_row(f"of recomputation (remat {found.remat})", f"{volume.recomputation:.4g}")
    table.add_row("of decoding and encoding", f"{volume.encoders:.4g}")
    table.add_row(f"seconds at {options.mfu:.0%} of the peak", f"{found.seconds:,.1f}")
    if found.judge_rate:
        table.add_row("questions a second, for judges not to be waited for", f"{found.judge_rate:,.1f}")
    table.add_section()
    table.add_row(f"{config.steps:,} steps: hours", f"{found.hours:,.1f}")
    table.add_row("device-hours", f"{found.device_hours:,.0f}")
    table.add_row("questions to judges", f"{found.judge_calls:,.0f}")
    if found.cost is not None:
        table.add_row("cost", f"{found.cost:,.0f}")
    console.print(table)
