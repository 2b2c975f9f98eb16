"""Tables that map the names of the release to the paths of our parameter tree, and what is done on the way."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lens_jax.errors import LensError, nearest

Transform = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


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
    # Release -> ours, given the shape of the indexed part.
    forward: Transform = same
    # Ours -> release, given the shape in the release.
    backward: Transform = same


def check(rules: list[Rule], shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Compare the tensors of a file or folder with a table; raise one error that lists everything wrong."""
    wanted = {rule.name: rule.shape for rule in rules}
    problems = [
        f"{name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    missing = [name for name in wanted if name not in shapes]
    extra = [name for name in shapes if name not in wanted]
    problems += [f"{name} is missing{nearest(name, extra)}" for name in missing]
    problems += [f"{name} is not expected{nearest(name, missing)}" for name in extra]
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise LensError(f"{source}: {len(problems)} of {len(wanted)} tensors do not fit: {shown}")


def to_tree(rules: list[Rule], tensors: Mapping[str, np.ndarray], template: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our leaves by path, filled from the tensors of the release.

    `template` maps every path to something with a shape and dtype; each leaf is allocated once.
    """
    leaves = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in template.items()}
    for rule in rules:
        part = leaves[rule.path][rule.index]
        leaves[rule.path][rule.index] = rule.forward(tensors[rule.name], part.shape).astype(part.dtype)
    return leaves


def to_release(rules: list[Rule], leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of the release by name, cut from our leaves."""
    return {rule.name: rule.backward(np.asarray(leaves[rule.path])[rule.index], rule.shape) for rule in rules}
