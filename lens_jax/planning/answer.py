"""What plans of reinforcement learning and distillation have in common: what a device holds, and how that is said."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from lens_jax.atomic import write_json
from lens_jax.console import make_console
from lens_jax.errors import LensError
from lens_jax.planning.options import DeviceOptions, make_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """What devices are, and what one of them holds."""

    hardware: str
    devices: int
    mesh: dict[str, int]
    # Bytes on one device throughout, those of each program besides, and what the host keeps for it.
    resident: dict[str, int]
    programs: dict[str, int]
    host: int
    usable: float
    remat: str
    # Attention kernel of each program that was lowered and has one.
    kernels: dict[str, str]

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + max(self.programs.values())

    @property
    def described_mesh(self) -> str:
        return " x ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1) or "one device"


Found = TypeVar("Found", bound=Held)
Options = TypeVar("Options", bound=DeviceOptions)


def answer(
    options: Options,
    make: Callable[[Options], Found],
    show: Callable[[Found, Options, Console], None],
    advice: Callable[[Found, Options], str],
    console: Console | None,
) -> Found:
    """Print the plan, write it where `--json` says; LensError, with the advice, where it does not fit."""
    console = console or make_console()
    with console.status("tracing"):
        found = make(options)
    show(found, options, console)
    if options.json:
        write_json(options.json, as_json(found, options))
    if found.peak > found.usable:
        kinds = {**found.resident, max(found.programs, key=found.programs.get): max(found.programs.values())}
        most = max(kinds, key=kinds.get)
        with console.status("looking for what fits"):
            change = advice(found, options)
        raise LensError(
            f"{found.peak / 1e9:.1f} GB a device do not fit into the {found.usable / 1e9:.1f} GB of {options.hardware} "
            f"(most is {most}, {kinds[most] / 1e9:.1f} GB); {change}"
        )
    return found


def as_json(found: Held, options: DeviceOptions) -> dict[str, Any]:
    """The plan as plain values, with the options it was made with (the run's config apart)."""
    values = dataclasses.asdict(found)
    return {"options": options.chosen(), "peak_bytes": found.peak, "fits": found.peak <= found.usable, **values}


def memory_table(found: Held, of_host: str) -> Table:
    """Memory of a device. `of_host`: what the host keeps."""
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
        table.add_row(f"in the host's memory: {of_host}", f"{found.host / 1e9:.2f}")
    return table
