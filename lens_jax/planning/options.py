"""What every plan is asked with, whatever the run trains, and the tables that it answers in."""

import dataclasses
from typing import Any

from rich import box
from rich.table import Table

from lens_jax.errors import LensError
from lens_jax.planning.hardware import Name


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """The devices, how well they are used, what they cost, and where the plan goes."""

    # What the devices are.
    hardware: Name = "h100"
    # How many of them.
    devices: int = 8
    # Share of the peak rate that is reached, of 1, by all networks alike.
    mfu: float = 0.35
    # Price of one device for an hour, in any currency; 0 leaves the cost out.
    price: float = 0.0
    # Lower every program too, and not only trace it.
    lower: bool = True
    # Also write the plan as JSON here.
    json: str = ""

    def __post_init__(self):
        self.at_least(devices=1, price=0)
        if not 0 < self.mfu <= 1:
            raise LensError(f"--mfu is {self.mfu}; it must be above 0 and at most 1")

    def at_least(self, **least: float) -> None:
        """LensError for an option that is below its least value."""
        for name, number in least.items():
            if getattr(self, name) < number:
                raise LensError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {number}")

    def chosen(self) -> dict[str, Any]:
        """The options as plain values, the run's config apart."""
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if name not in ("config", "json")}


def make_table(title: str, first: str, *others: str) -> Table:
    """Numbers to the right, nothing broken over lines: it fits into 80 columns."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column(first, no_wrap=True)
    for name in others:
        made.add_column(name, justify="right", no_wrap=True)
    return made
