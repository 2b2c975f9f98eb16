"""What a program sends between devices, read off the layouts of its values, and how long that takes."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from lens_jax.planning.hardware import Hardware
from lens_jax.planning.program import Operation, Program, Value
from lens_jax.sharding import AXES

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]
# Between a sum over devices and the cut of its result, which together are a reduce-scatter.
_TRANSPARENT = ("convert_element_type", "transpose", "reshape", "squeeze", "expand_dims", "neg", "copy")


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
    # Sums whose result nothing has read yet.
    sums: dict[Value, Collective] = {}
    for operation in program.operations:
        first = operation.inputs[0] if operation.inputs else None
        pending = sums.get(first)
        if operation.name == "reshard" and pending:
            found += _scattered(pending, operation, program.mesh)
        if operation.name in _TRANSPARENT and pending:
            sums[operation.outputs[0]] = pending
            continue
        new = list(moved(operation))
        found += new
        if len(new) == 1 and new[0].kind == "all-reduce":
            sums[operation.outputs[0]] = new[0]
        for body in operation.bodies:
            found += [dataclasses.replace(part, times=part.times * operation.length) for part in collectives(body)]
    return [part for part in found if part.bytes and math.prod(program.mesh[axis] for axis in part.axes) > 1]


def moved(operation: Operation) -> Iterator[Collective]:
    """What one operation sends by itself, the body of a loop not counted."""
    if operation.name == "reshard":
        yield from _reshard(operation)
        return
    if operation.name in ("all_gather", "all_to_all"):
        # Inside `shard_map`: the frozen text encoder brings its layers together there.
        axes = operation.params["axis_name"]
        axes = axes if isinstance(axes, tuple) else (axes,)
        if operation.name == "all_gather":
            yield Collective("all-gather", axes, operation.outputs[0].bytes, "encoder")
        else:
            yield Collective("all-to-all", axes, operation.inputs[0].bytes, "encoder")
        return
    if operation.name == "psum":
        summed = operation.params["axes"]
    elif operation.name == "dot_general":
        contracted = operation.params["dimension_numbers"][0][0]
        summed = [axis for i in contracted for axis in operation.inputs[0].axes[i]]
    elif operation.name.startswith("reduce_") and operation.inputs[0] is not None:
        summed = [axis for i in operation.params.get("axes", ()) for axis in operation.inputs[0].axes[i]]
    else:
        return
    if summed:
        # Over rows only gradients are summed (and losses, which are numbers); over others activations.
        what = "gradients" if set(summed) & {"data", "fsdp"} else "activations"
        yield Collective("all-reduce", tuple(summed), operation.outputs[0].bytes, what)


def _reshard(operation: Operation) -> Iterator[Collective]:
    source, target = operation.inputs[0], operation.outputs[0]
    if source is None or source.automatic or target.automatic:
        return
    where = lambda value: {axis: i for i, axes in enumerate(value.axes) for axis in axes}
    before, after = where(source), where(target)
    gathered = tuple(axis for axis in before if axis not in after)
    exchanged = tuple(axis for axis in before if axis in after and before[axis] != after[axis])
    if gathered:
        what = "weights" if gathered == ("fsdp",) else "activations"
        yield Collective("all-gather", gathered, target.bytes, what)
    if exchanged:
        yield Collective("all-to-all", exchanged, source.bytes, "activations")


def _scattered(total: Collective, cut: Operation, mesh: dict[str, int]) -> list[Collective]:
    """A sum of which each device keeps a part: changes it to what is left, and gives the reduce-scatter before it."""
    before, after = ({axis for axes in value.axes for axis in axes} for value in (cut.inputs[0], cut.outputs[0]))
    over = tuple(axis for axis in total.axes if axis in after - before)
    if not over:
        return []
    scatter = dataclasses.replace(total, kind="reduce-scatter", axes=over)
    total.axes = tuple(axis for axis in total.axes if axis not in over)
    total.bytes //= math.prod(mesh[axis] for axis in over)
    return [scatter]
