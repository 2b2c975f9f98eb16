"""What a program holds on one device while it runs, by the lifetimes of its values.

A compiler fuses what is computed number by number into its neighbours, so such values take no memory of their own
unless a product, a kernel, a collective or a loop reads them. What remains has a first and a last use in the order of
the program; the most that is alive at one time is the estimate.
"""

import dataclasses
from collections import defaultdict

import jax

from lens_jax.planning.communication import moved
from lens_jax.planning.program import ALIAS, Operation, Program, Value, read

# Operations that read their operands from memory and write their results there. All others are fused.
_HEAVY = {
    "dot_general", "conv_general_dilated", "ragged_dot_general", "scan", "while", "cond", "pallas_call",
    "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper", "dynamic_update_slice",
    "sort", "top_k", "gather", "scatter", "scatter-add", "cumsum", "argmax",
    "psum", "unreduced_psum", "all_gather", "all_to_all", "reduce_scatter", "unreduced_reduce_scatter",
}  # fmt: skip
# These read what they sum while it is computed.
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"}
# Compilers neither find the best order nor fuse all that could be, hence a factor on the working set. On a CPU 1.5
# brings the estimate to between 0.89 and 1.15 of what XLA needs, under every remat policy (tests/planning); a GPU is
# taken to be like it, unmeasured. The TPU compiler keeps the rotations in float32: compiled for a v5p slice of eight
# with libtpu 0.0.42, the full-size micro-step of six images of 736 x 1472 a device takes 17.4 GB under remat "full",
# where 4.0 gives 16.7, and that of 32 images 68.6, where it gives 78.4.
SLACK = {"cpu": 1.5, "cuda": 1.5, "tpu": 4.0}
# A TPU stores the last axis in whole lanes, so that the 64 channels of a head take as much as 128: of 24 images of
# 512 x 512 a v5p under remat "mlp" the compiler (libtpu 0.0.52) says 68.3 GB, the estimate 70.6.
LANES = {"cpu": 1, "cuda": 1, "tpu": 128}


@dataclasses.dataclass(frozen=True)
class Peak:
    """The fullest moment of a program."""

    # Bytes on one device besides the arguments: "saved activations", "gradients", "gathered weights",
    # "average and moments" (where they are offloaded), "working set".
    kinds: dict[str, int]
    # The operation then under way.
    scope: str

    @property
    def bytes(self) -> int:
        return sum(self.kinds.values())


def peak(program: Program, platform: str) -> Peak:
    """The most that one device holds besides the arguments; results are taken to be written over donated arguments."""
    found, slack = _Lifetimes(program, LANES[platform]).peak(), SLACK[platform]
    kinds = {kind: round(size * (slack if kind == "working set" else 1)) for kind, size in found.kinds.items()}
    return Peak(kinds, found.scope)


class _Lifetimes:
    """Birth and death of every value that has memory of its own. Time 2i is before operation i, 2i + 1 is during it."""

    def __init__(self, program: Program, lanes: int):
        self.program, self.lanes = program, lanes
        self.arguments = set(program.inputs)
        self.born: dict[Value, int] = dict.fromkeys(program.inputs, 0)
        self.dies: dict[Value, int] = {}
        self.kinds: dict[Value, str] = {}
        # What a fused value is computed from: values that have memory.
        self.sources: dict[Value, frozenset[Value]] = {}
        self.aliases: dict[Value, Value] = {}
        for i, operation in enumerate(program.operations):
            self._visit(2 * i, operation)
        for value in program.outputs:
            if value is not None:
                value = self.aliases.get(value, value)
                self._read(2 * len(program.operations), value)

    def _visit(self, time: int, operation: Operation) -> None:
        inputs = [self.aliases.get(value, value) for value in operation.inputs if value is not None]
        if operation.name == ALIAS:
            self.aliases[operation.outputs[0]] = inputs[0]
            return
        if not _writes(operation):
            found = frozenset().union(*map(self._sources_of, inputs))
            self.sources.update(dict.fromkeys(operation.outputs, found))
            return
        for value in inputs:
            if value not in self.born and operation.name not in _REDUCTIONS:
                self._read(time, value)
                self._start(time, value, "working set")
            self._read(time + 1 if value in self.born else time, value)
        for value, kind in zip(operation.outputs, _kinds(operation)):
            self._start(time + 1, value, kind)

    def _sources_of(self, value: Value) -> frozenset[Value]:
        return frozenset((value,)) if value in self.born else self.sources.get(value, frozenset())

    def _read(self, time: int, value: Value) -> None:
        for source in self._sources_of(value):
            self.dies[source] = max(self.dies.get(source, 0), time)

    def _start(self, time: int, value: Value, kind: str) -> None:
        self.born[value], self.dies[value], self.kinds[value] = time, time, kind

    def peak(self) -> Peak:
        starts, ends = defaultdict(list), defaultdict(list)
        for value, time in self.born.items():
            # The shape of what the compiler alone lays out says nothing about one device.
            if value not in self.arguments and not value.automatic:
                starts[time].append(value)
                ends[self.dies[value]].append(value)
        alive: set[Value] = set()
        size, best = 0, Peak({}, "")
        most = 0
        for time in range(2 * len(self.program.operations) + 1):
            for value in starts[time]:
                alive.add(value)
                size += self._bytes(value)
            operation = self.program.operations[time // 2] if time % 2 else None
            bodies = operation.bodies if operation else ()
            inner = max(
                (_Lifetimes(body, self.lanes).peak() for body in bodies), key=lambda p: p.bytes, default=Peak({}, "")
            )
            if size + inner.bytes > most:
                most = size + inner.bytes
                kinds = defaultdict(int, inner.kinds)
                for value in alive:
                    kinds[self.kinds[value]] += self._bytes(value)
                best = Peak(dict(kinds), inner.scope or (operation.scope if operation else ""))
            for value in ends[time]:
                alive.remove(value)
                size -= self._bytes(value)
        return best

    def _bytes(self, value: Value) -> int:
        """What is stacked is stored as it is; the slack of the working set covers how that is laid out."""
        if self.kinds[value] != "saved activations" or not value.shape:
            return value.bytes
        return value.bytes // value.shape[-1] * -(-value.shape[-1] // self.lanes) * self.lanes


def _writes(operation: Operation) -> bool:
    """Whether the results of an operation are in memory of their own."""
    if operation.name == "device_put":
        # What was offloaded comes in whole; what goes back is written to the host as it is computed.
        return jax.memory.Space.Device in operation.params["devices"]
    if operation.name == "reshard":
        return any(True for _ in moved(operation))
    return operation.name in _HEAVY or operation.name in _REDUCTIONS


def _kinds(operation: Operation) -> list[str]:
    """What the results of an operation are."""
    count = len(operation.outputs)
    if operation.name == "device_put":
        return ["average and moments"] * count
    if operation.name == "reshard" and any(part.what == "weights" for part in moved(operation)):
        return ["gathered weights"] * count
    if operation.name == "scan":
        # The scan over the blocks: forward it stacks what the backward pass will read, backward the gradients.
        # What is stacked has one dimension more than what the body gives; the rest is carried from block to block.
        stacked = "gradients" if operation.params["reverse"] else "saved activations"
        rank = lambda value: len(value.shape) if value else 0
        pairs = zip(operation.outputs, operation.bodies[0].outputs)
        return [stacked if rank(whole) > rank(one) else "working set" for whole, one in pairs]
    return ["working set"] * count


def peaks(traced: dict[str, jax.stages.Traced], platform: str) -> dict[str, int]:
    """Bytes that each program holds besides what is there throughout."""
    return {name: peak(read(one.jaxpr), platform).bytes for name, one in traced.items()}
