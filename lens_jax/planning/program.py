"""A traced program as a plain list of operations, each value with its layout on the mesh.

Explicit sharding makes the layout part of a value's type, so a trace on an abstract mesh already says what every device
holds and what it has to send: no formula that could drift from the model. Calls (jit, remat, shard_map, custom
derivatives) are inlined; loops keep their body.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.extend import core
from jax.sharding import AxisType


@dataclasses.dataclass(eq=False)
class Value:
    """One array of the program."""

    # Shape of the part that one device holds, and bytes of a number.
    shape: tuple[int, ...]
    itemsize: int
    # Mesh axes of each dimension.
    axes: tuple[tuple[str, ...], ...]
    # Mesh axes whose devices each hold one summand of it.
    unsummed: frozenset[str] = frozenset()
    # Laid out by the compiler alone (inside `auto_axes`): its shape here is that of the whole.
    automatic: bool = False

    @property
    def bytes(self) -> int:
        """Bytes on one device."""
        return math.prod(self.shape) * self.itemsize


@dataclasses.dataclass(eq=False)
class Operation:
    """One primitive. Scalars written into the program are no inputs; loops and branches have bodies."""

    name: str
    inputs: list[Value | None]
    outputs: list[Value]
    params: dict[str, Any]
    # Where in the model: named scopes and transformations.
    scope: str
    bodies: tuple["Program", ...] = ()
    # How often a body runs: of a `while`, whose number is not known, once.
    length: int = 1


@dataclasses.dataclass(eq=False)
class Program:
    """Operations in order."""

    inputs: list[Value]
    outputs: list[Value | None]
    operations: list[Operation]
    # Devices along each mesh axis.
    mesh: dict[str, int]


# No primitive: one value as it is seen from inside or outside `shard_map`.
ALIAS = "alias"
_LOOPS = ("scan", "while", "cond")
# Their bodies run on their own terms.
_NO_CALLS = (*_LOOPS, "pallas_call")


def read(traced: core.ClosedJaxpr) -> Program:
    """The operations of a traced function."""
    mesh: dict[str, int] = {}
    return _read(traced.jaxpr, mesh, "")


def _read(jaxpr: core.Jaxpr, mesh: dict[str, int], scope: str) -> Program:
    values = {var: _value(var.aval, mesh) for var in (*jaxpr.invars, *jaxpr.constvars)}
    operations: list[Operation] = []
    _append(jaxpr, values, mesh, scope, operations)
    outputs = [None if isinstance(var, core.Literal) else values[var] for var in jaxpr.outvars]
    return Program([values[var] for var in jaxpr.invars], outputs, _needed(operations, outputs), mesh)


def _needed(operations: list[Operation], outputs: list[Value | None]) -> list[Operation]:
    """Without those whose results nobody reads, as compilers leave them out: a kernel whose results were kept."""
    read, needed = set(outputs), []
    for operation in reversed(operations):
        if not operation.outputs or not read.isdisjoint(operation.outputs):
            needed.append(operation)
            read.update(operation.inputs)
    return needed[::-1]


def _append(jaxpr, values, mesh, scope, operations) -> None:
    look_up = lambda var: None if isinstance(var, core.Literal) else values[var]
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, _bodies(equation.params)
        here = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        inputs = [look_up(var) for var in equation.invars]
        if len(inner) == 1 and name not in _NO_CALLS and len(inner[0].invars) == len(inputs):
            body = inner[0]
            # Inside `shard_map` a value is a local one, of the same bytes but without a layout.
            local = name == "shard_map"
            bound = {}
            for var, value in zip(body.invars, inputs):
                seen = _alias(value, var, mesh, operations) if local and value else value
                bound[var] = seen or _value(var.aval, mesh)
            bound |= {var: _value(var.aval, mesh) for var in body.constvars}
            _append(body, bound, mesh, here, operations)
            for var, result in zip(equation.outvars, body.outvars):
                if isinstance(result, core.Literal):
                    values[var] = _value(var.aval, mesh)
                else:
                    values[var] = _alias(bound[result], var, mesh, operations) if local else bound[result]
            continue
        for var in equation.outvars:
            values[var] = _value(var.aval, mesh)
        outputs = [values[var] for var in equation.outvars]
        operation = Operation(name, inputs, outputs, equation.params, here)
        if name in _LOOPS:
            operation.bodies = tuple(_read(body, mesh, here) for body in inner)
            operation.length = equation.params.get("length", 1)
        operations.append(operation)


def _alias(value: Value, var: core.Var, mesh: dict[str, int], operations: list[Operation]) -> Value:
    """The same memory seen as another type."""
    seen = _value(var.aval, mesh)
    operations.append(Operation(ALIAS, [value], [seen], {}, ""))
    return seen


def _bodies(value: Any) -> list[core.Jaxpr]:
    """Every program inside the parameters of a primitive."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [body for part in parts for body in _bodies(part)]


def _value(aval: Any, mesh: dict[str, int]) -> Value:
    sharding, shape = getattr(aval, "sharding", None), getattr(aval, "shape", ())
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
    if sharding is None or sharding.mesh.empty:
        return Value(shape, itemsize, ((),) * len(shape))
    mesh.update(sharding.mesh.shape)
    spec = sharding.spec.partitions
    spec = (*spec, *(None,) * (len(shape) - len(spec)))
    axes = tuple(() if names is None else names if isinstance(names, tuple) else (names,) for names in spec)
    local = tuple(-(-size // math.prod(mesh[axis] for axis in names)) for size, names in zip(shape, axes))
    automatic = any(kind == AxisType.Auto for kind in sharding.mesh.axis_types)
    return Value(local, itemsize, axes, frozenset(sharding.spec.unreduced), automatic)


def products(program: Program) -> int:
    """Operations of all matrix products on one device, 2 a multiply-add, those of loops and recomputation included."""
    total = 0
    for operation in program.operations:
        if operation.name == "dot_general":
            contracted = operation.params["dimension_numbers"][0][0]
            left = operation.inputs[0].shape
            total += 2 * math.prod(operation.outputs[0].shape) * math.prod(left[i] for i in contracted)
        total += operation.length * sum(map(products, operation.bodies))
    return total


def trace(function, *args, **options) -> Program:
    """The operations of `function` for these arguments (arrays or shapes), which `jax.jit` takes with `options`."""
    return read(jax.jit(function, **options).trace(*args).jaxpr)
