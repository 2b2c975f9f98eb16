"""Tables that map the names of the release to the paths of our parameter tree, and what is done on the way.

Everything here works a tensor or a leaf at a time, so that a model converts in the memory of its largest leaf.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lens_jax.errors import LensError, nearest

Transform = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]

FLOATS = tuple(np.dtype(d) for d in (np.float32, ml_dtypes.bfloat16, np.float16))


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a tensor before it is read."""

    # Type of an element.
    dtype: np.dtype
    # Sizes of its axes.
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        count = 1  # Python integers: a product of hostile sizes does not wrap around
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name whose values are made when they are asked for, and not kept."""

    def __init__(
        self,
        specs: Mapping[str, Spec],
        read: Callable[[str], np.ndarray],
        parts: Callable[[str], list[Callable[[], np.ndarray]]] | None = None,
    ):
        self.specs = dict(specs)
        self._read = read
        self._parts = parts

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.specs:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name) -> bool:
        return name in self.specs  # Mapping's own would read the tensor

    def parts(self, name: str) -> list[Callable[[], np.ndarray]]:
        """Makers of a tensor's parts, in their order along its first axis, for who must not hold all of it."""
        return self._parts(name) if self._parts else [lambda: self[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor without reading it."""
        return self.specs[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor without reading it."""
        return self.specs[name].dtype


def specs_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Spec]:
    """The specs of any mapping to arrays; nothing is read where they are known already."""
    if isinstance(tensors, Tensors):
        return tensors.specs
    return {name: Spec(np.dtype(array.dtype), tuple(array.shape)) for name, array in tensors.items()}


def finite(tensors: Tensors, source: str) -> Tensors:
    """The same tensors; to read one that has a number which is not finite is a LensError."""

    def read(name: str) -> np.ndarray:
        array = tensors[name]
        if not np.isfinite(array).all():
            raise LensError(f"{source}: {shown(name)} has numbers that are not finite; is the file damaged?")
        return array

    return Tensors(tensors.specs, read)


def digest(tensors: Tensors) -> str:
    """Tells weights from others: 16 hexadecimal digits of names, shapes and some of the numbers of each.

    Four kilobytes of every tensor, from its middle, since to read all of a large network takes a minute.
    """
    found = hashlib.sha256()
    for name, spec in sorted(tensors.specs.items()):
        found.update(f"{name} {spec.dtype} {list(spec.shape)} ".encode())
        numbers = tensors[name].reshape(-1)
        found.update(numbers[numbers.size // 2 :][: 4096 // spec.dtype.itemsize].tobytes())
    return found.hexdigest()[:16]


def linear(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """PyTorch keeps a Linear as [out, in]; ours is [in..., out...]."""
    return array.T.reshape(shape)


def linear_back(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array.reshape(shape[::-1]).T


def same(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of the release and the leaf of our tree that holds it.

    `path` ends in indices where the release keeps apart what we stack, e.g. `blocks/image/qkv/kernel` with index (3,)
    for block 3, or `blocks/image/gate_up/kernel` with index (3, slice(None), 0) for its gate.
    """

    # Name in the release.
    name: str
    # Shape in the release.
    shape: tuple[int, ...]
    # Leaf of our tree.
    path: str
    # Where in that leaf.
    index: tuple[Any, ...] = ()
    # Release -> ours, given the shape of the indexed part; a view where it can be.
    forward: Transform = same
    # Ours -> release, given the shape in the release; a view where it can be.
    backward: Transform = same
    # Accepted in a file.
    dtypes: tuple[np.dtype, ...] = FLOATS
    # What it is written as; None is the dtype of our leaf.
    written: np.dtype | None = None
    # A tensor that is not required is zero when it is missing.
    required: bool = True


def check(rules: list[Rule], specs: Mapping[str, Spec], source: str) -> None:
    """Compare the tensors of a file or folder with a table; raise one LensError that lists everything wrong."""
    wanted = {rule.name: rule for rule in rules}
    problems = []
    for name, rule in wanted.items():
        if name not in specs:
            continue
        if specs[name].shape != rule.shape:
            problems.append(f"{name} is {list(specs[name].shape)}, expected {list(rule.shape)}")
        elif specs[name].dtype not in rule.dtypes:
            accepted = ", ".join(str(d) for d in rule.dtypes)
            problems.append(f"{name} is {specs[name].dtype}, accepted: {accepted}")
    missing = [rule.name for rule in rules if rule.name not in specs and rule.required]
    extra = [name for name in specs if name not in wanted]
    # The search for a near name takes milliseconds, and the message shows only six.
    hint = lambda i, name, known: nearest(name, known) if i < 6 else ""
    problems += [f"{name} is missing{hint(i, name, extra)}" for i, name in enumerate(missing)]
    problems += [f"{shown(name)} is not expected{hint(i, name, missing)}" for i, name in enumerate(extra)]
    if problems:
        listed = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise LensError(f"{source}: {len(problems)} of {len(wanted)} tensors do not fit: {listed}")


def shown(name: str) -> str:
    """A name out of a file as it can stand in a message of one line."""
    return name if name.isprintable() and len(name) < 200 else repr(name)[:200]


def leaves(rules: list[Rule], tensors: Mapping[str, np.ndarray], template: Mapping[str, Any]) -> Tensors:
    """Our leaves by path, in the order of `template`, each made when it is read and not kept.

    The parts of a stacked leaf are its layers, so a model converts in the memory of a few layers of its largest leaf.

    Args:
      rules: a table that `check` has found to fit `tensors`.
      template: every path with something that has a shape and dtype; a path that no rule fills is an error.
    """
    by_path: dict[str, list[Rule]] = {}
    for rule in rules:
        by_path.setdefault(rule.path, []).append(rule)
    specs = {path: Spec(np.dtype(like.dtype), tuple(like.shape)) for path, like in template.items()}

    def fill(leaf: np.ndarray, rules: list[Rule], depth: int = 0) -> np.ndarray:
        for rule in rules:
            part = leaf[(*rule.index[depth:], ...)]  # the dots make it a view even where it is one number
            if rule.name in tensors:
                _assign(part, rule.forward(tensors[rule.name], part.shape))
            else:
                part[...] = 0
        return leaf

    def read(path: str) -> np.ndarray:
        return fill(np.empty(specs[path].shape, specs[path].dtype), by_path[path])

    def parts(path: str) -> list[Callable[[], np.ndarray]]:
        spec, layers = specs[path], {}
        for rule in by_path[path]:
            layers.setdefault(rule.index[0] if rule.index else None, []).append(rule)
        if set(layers) != set(range(len(layers))) or spec.shape[:1] != (len(layers),):
            return [lambda: read(path)]
        one = lambda layer: fill(np.empty(spec.shape[1:], spec.dtype), layers[layer], depth=1)
        return [functools.partial(one, layer) for layer in range(len(layers))]

    return Tensors(specs, read, parts)


def to_release(rules: list[Rule], leaves: Mapping[str, Any], dtype: np.dtype | None = None) -> Tensors:
    """The tensors of the release by name, each cut from our leaves when it is read.

    Args:
      leaves: numpy or JAX arrays by path.
      dtype: what floating-point tensors are written as; None keeps the dtype of the leaf.
    """
    by_name = {rule.name: rule for rule in rules}

    def spec(rule: Rule) -> Spec:
        return Spec(np.dtype(rule.written or dtype or leaves[rule.path].dtype), rule.shape)

    def read(name: str) -> np.ndarray:
        rule = by_name[name]
        # Indexed before it becomes an array of the host: a stacked leaf on a device would be fetched for every block.
        part = np.asarray(leaves[rule.path][rule.index])
        array = np.empty(rule.shape, specs[name].dtype)
        _assign(array, rule.backward(part, rule.shape))
        return array

    specs = {rule.name: spec(rule) for rule in rules}
    return Tensors(specs, read)


def _assign(target: np.ndarray, value: np.ndarray) -> None:
    """target[...] = value, cast to its dtype.

    A transposed matrix is copied sixteen of its rows at a time: a plain copy writes one element in each cache line and
    is four times slower (57 MB: 72 ms against 17 ms).
    """
    order = np.argsort([-stride for stride in value.strides], kind="stable")
    source, target_view = value.transpose(order), target.transpose(order)
    if value.flags.c_contiguous or source.ndim < 2 or source.shape[-1] < 64:
        target[...] = value
        return
    for index in itertools.product(*(range(size) for size in source.shape[:-2])):
        for start in range(0, source.shape[-2], 16):
            rows = (*index, slice(start, start + 16))
            target_view[rows] = source[rows]
