"""What a program sends between devices, read off the layouts of its values, and how long that takes."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from lens_jax.parallel import AXES
from lens_jax.planning.hardware import Hardware
from lens_jax.planning.program import Operation, Program, Value

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]
# Those that the model asks for by name; others follow from the layouts.
_EXPLICIT: dict[str, Kind] = {
    "all_gather": "all-gather",
    "all_to_all": "all-to-all",
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "unreduced_psum": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "unreduced_reduce_scatter": "reduce-scatter",
}


@dataclasses.dataclass
class Collective:
    """One collective, as often as it runs."""

    kind: Kind
    # Mesh axes it runs over.
    axes: tuple[str, ...]
    # Bytes of its whole: what an all-gather gives, or what a device brings to a sum or an exchange.
    bytes: int
    # What is sent: "weights" that a block gathers, their "gradients", "activations", or what an "encoder" does.
    what: str
    times: int = 1

    def sent(self, mesh: dict[str, int]) -> float:
        """Bytes that each device sends in a ring, over all times; as many arrive."""
        devices = math.prod(mesh[axis] for axis in self.axes)
        return self.times * (2 if self.kind == "all-reduce" else 1) * self.bytes * (devices - 1) / devices

    def seconds(self, mesh: dict[str, int], hardware: Hardware) -> float:
        """At the stated bandwidths, the slower of the two networks alone.

        Devices are numbered with the last axis fastest, and a domain holds neighbours. A ring enters and leaves each
        domain once, and is split over all the network cards of its members there.
        """
        devices = math.prod(mesh[axis] for axis in self.axes)
        together = 1
        for axis in reversed(AXES):
            # Members of one domain: those that differ only in axes whose strides still fit into it.
            stride = math.prod(mesh[other] for other in AXES[AXES.index(axis) + 1 :])
            if axis in self.axes:
                together *= min(mesh[axis], max(1, hardware.domain // stride))
        domains = max(1, devices // together)
        scale = self.times * (2 if self.kind == "all-reduce" else 1) * self.bytes
        fast = scale * (devices - 1) / devices / hardware.fast
        share = 1 if self.kind == "all-to-all" else together
        slow = scale * (domains - 1) / domains / (share * hardware.slow)
        return max(fast if together > 1 else 0.0, slow)


def collectives(program: Program) -> list[Collective]:
    """Everything that one run of a program sends."""
    found: list[Collective] = []
    for operation in program.operations:
        found += moved(operation)
        for body in operation.bodies:
            found += [dataclasses.replace(part, times=part.times * operation.length) for part in collectives(body)]
    return [part for part in found if part.bytes and math.prod(program.mesh[axis] for axis in part.axes) > 1]


def moved(operation: Operation) -> Iterator[Collective]:
    """What one operation sends by itself, the bodies of loops not counted."""
    first, result = (
        operation.inputs[0] if operation.inputs else None,
        operation.outputs[0] if operation.outputs else None,
    )
    if first is None or result is None:
        return
    if operation.name == "reshard":
        yield from _reshard(first, result)
    elif operation.name in _EXPLICIT:
        kind = _EXPLICIT[operation.name]
        axes = operation.params.get("axis_name", operation.params.get("axes"))
        # Inside `shard_map`: gradients on their way home, and the frozen text encoder's layers.
        what = "gradients" if kind in ("reduce-scatter", "all-reduce") else "encoder"
        yield Collective(kind, _names(axes), (result if kind == "all-gather" else first).bytes, what)
    elif operation.name == "dot_general" or operation.name.startswith("reduce_"):
        dot = operation.name == "dot_general"
        over = operation.params["dimension_numbers"][0][0] if dot else operation.params.get("axes", ())
        summed = tuple(axis for i in over for axis in first.axes[i] if axis not in result.unsummed)
        if summed:
            # Over rows only gradients are summed (and losses, which are numbers); over others activations.
            what = "gradients" if {"data", "fsdp"} & set(summed) else "activations"
            yield Collective("all-reduce", summed, result.bytes, what)


def _names(axes) -> tuple[str, ...]:
    return axes if isinstance(axes, tuple) else (axes,)


def _reshard(source: Value, target: Value) -> Iterator[Collective]:
    if source.automatic or target.automatic:
        return
    where = lambda value: {axis: i for i, axes in enumerate(value.axes) for axis in axes}
    before, after = where(source), where(target)
    gathered = tuple(axis for axis in before if axis not in after)
    exchanged = tuple(axis for axis in before if axis in after and before[axis] != after[axis])
    if gathered:
        yield Collective("all-gather", gathered, target.bytes, "weights" if gathered == ("fsdp",) else "activations")
    if exchanged:
        yield Collective("all-to-all", exchanged, source.bytes, "activations")
