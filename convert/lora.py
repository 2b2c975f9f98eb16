"""An adapter of the denoiser as the release has it, A [rank, in] and B [out, rank] a module, to our tree and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from lens_jax.convert import table
from lens_jax.convert.lora_names import Module, modules
from lens_jax.convert.table import Rule, Spec, Tensors
from lens_jax.errors import LensError
from lens_jax.models import denoiser, lora
from lens_jax.models.denoiser import DenoiserConfig


@dataclasses.dataclass(frozen=True)
class Kronecker:
    """A LoKr of one module: what it adds to the weight [out, in] is scale w1 ⊗ w2, of full rank."""

    w1: np.ndarray
    w2: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2.shape[1]

    def change(self) -> np.ndarray:
        return np.float32(self.scale) * np.kron(self.w1.astype(np.float32), self.w2.astype(np.float32))


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Changes to a denoiser, by module of the release."""

    # A [rank, in] and B [out, rank] of those of low rank.
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
    # What they add is times alpha / rank.
    rank: int
    alpha: float
    # Changes of full rank.
    kroneckers: Mapping[str, Kronecker] = dataclasses.field(default_factory=dict)
    # What it was trained beside, and what a prompt must say to mean it; as its file has it.
    base_model: str = ""
    trigger: str = ""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def change(self, module: str) -> np.ndarray:
        """What is added to the weight [out, in] of a module, float32."""
        if module in self.kroneckers:
            return self.kroneckers[module].change()
        a, b = (part.astype(np.float32) for part in self.factors[module])
        return np.float32(self.scale) * (b @ a)


def kernels(config: DenoiserConfig) -> dict[str, Any]:
    """Our kernels by the path of their layer, as shapes."""
    leaves = traverse_util.flatten_dict(denoiser.abstract_params(config), sep="/")
    return {path: leaves[f"{path}/kernel"] for path in lora.MODULES}


def sizes(config: DenoiserConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every module of the release that can have an adapter."""
    shapes, found = kernels(config), {}
    for name, module in modules(config).items():
        a, b = lora.shapes(module.path, shapes[module.path].shape, 1)
        count = lambda shape, m=module: int(np.prod(shape, dtype=np.int64)) // _shared(m, config)
        found[name] = count(b), count(a)
    return found


def _shared(module: Module, config: DenoiserConfig) -> int:
    """How many modules a leaf has."""
    return (config.layers if module.block is not None else 1) * (2 if module.pair is not None else 1)


def to_tree(adapter: Adapter, config: DenoiserConfig) -> dict:
    """Our tree, numpy in float32, without alpha / rank; blocks that have no adapter have one of zeros."""
    known = modules(config)
    ranks: dict[str, int] = {}
    for name, (a, _) in adapter.factors.items():
        path = known[name].path
        ranks[path] = max(ranks.get(path, 0), len(a))
    tensors = {}
    for name, (a, b) in adapter.factors.items():
        # q, k and v of a rank each are one adapter of three times that; beside it others of a layer are wider by zeros.
        room = ranks[known[name].path] - len(a)
        tensors[f"{name}.a"], tensors[f"{name}.b"] = np.pad(a, ((0, room), (0, 0))), np.pad(b, ((0, 0), (0, room)))
    rules, template = _rules(config, ranks)
    made = table.leaves(rules, tensors, template)
    return traverse_util.unflatten_dict({path: made[path] for path in template}, sep="/")


def from_tree(tree: dict, config: DenoiserConfig, alpha: float, **about: str) -> Adapter:
    """The adapter in a tree of ours, of one rank and without alpha / rank; `about` are the other fields."""
    leaves = traverse_util.flatten_dict(tree, sep="/")
    ranks = {path[:-2]: leaf.shape[lora.rank_axis(path)] for path, leaf in leaves.items()}
    rules, _ = _rules(config, ranks)
    made = table.to_release(rules, leaves)
    names = [rule.name[:-2] for rule in rules if rule.name.endswith(".a")]
    factors = {name: (made[f"{name}.a"], made[f"{name}.b"]) for name in names}
    return Adapter(factors, max(ranks.values()), alpha, **about)


def _rules(config: DenoiserConfig, ranks: Mapping[str, int]) -> tuple[list[Rule], dict[str, Any]]:
    """The table of A and B of the layers in `ranks`, and our leaves as shapes."""
    shapes, size = kernels(config), sizes(config)
    template = {}
    for path, rank in ranks.items():
        for name, shape in zip("ab", lora.shapes(path, shapes[path].shape, rank)):
            template[f"{path}/{name}"] = Spec(np.dtype(np.float32), shape)
    rules = []
    for name, module in modules(config).items():
        if module.path not in ranks:
            continue
        rank, (outputs, inputs) = ranks[module.path], size[name]
        block = () if module.block is None else (module.block,)
        pair = () if module.pair is None else (module.pair,)
        of_a = (*block, slice(None), *pair) if pair else block
        both = {"forward": table.linear, "backward": table.linear_back, "required": False}
        rules.append(Rule(f"{name}.a", (rank, inputs), f"{module.path}/a", of_a, **both))
        rules.append(Rule(f"{name}.b", (outputs, rank), f"{module.path}/b", (*block, *pair), **both))
    return rules, template


def full_changes(adapter: Adapter, config: DenoiserConfig) -> Tensors:
    """What the changes of full rank add to our kernels, by path of the leaf, float32, each made when it is read."""
    known, shapes = modules(config), kernels(config)
    changed = {known[name].path for name in adapter.kroneckers}
    template = {f"{path}/kernel": Spec(np.dtype(np.float32), shapes[path].shape) for path in sorted(changed)}
    rules, size = [], sizes(config)
    for name, module in known.items():
        block = () if module.block is None else (module.block,)
        index = block if module.pair is None else (*block, slice(None), module.pair)
        rules.append(Rule(name, size[name], f"{module.path}/kernel", index, table.linear, required=False))
    specs = {name: Spec(np.dtype(np.float32), one.shape) for name, one in adapter.kroneckers.items()}
    return table.leaves(rules, Tensors(specs, adapter.change), template)


def merged(tensors: Tensors, adapters: Sequence[tuple[Adapter, float]], dtype: np.dtype | None = None) -> Tensors:
    """The tensors of a release's denoiser with adapters, each times a factor: summed in float32 and rounded once.

    dtype: of the result, by default that of `tensors`.
    """
    specs = {name: Spec(np.dtype(dtype or spec.dtype), spec.shape) for name, spec in tensors.specs.items()}

    def read(name: str) -> np.ndarray:
        module = name.removesuffix(".weight")
        weight, changed = tensors[name], False
        for adapter, factor in adapters:
            if name.endswith(".weight") and (module in adapter.factors or module in adapter.kroneckers):
                weight, changed = weight.astype(np.float32) + np.float32(factor) * adapter.change(module), True
        return weight.astype(specs[name].dtype) if changed or dtype else weight

    return Tensors(specs, read)


def check(adapter: Adapter, config: DenoiserConfig, where: str) -> None:
    """LensError where an adapter is of another model, of mixed ranks, or not finite."""
    size, problems = sizes(config), []
    for name, (a, b) in adapter.factors.items():
        if name in size and (b.shape[0], a.shape[1]) != size[name]:
            problems.append(f"{name} is {[b.shape[0], a.shape[1]]}, this model has {list(size[name])}")
    for name, one in adapter.kroneckers.items():
        if name in size and one.shape != size[name]:
            problems.append(f"{name} is {list(one.shape)}, this model has {list(size[name])}")
    problems += [f"{name} is not in this model" for name in (*adapter.factors, *adapter.kroneckers) if name not in size]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise LensError(f"{where}: an adapter of another model: {'; '.join(problems[:6])}{more}")
    numbers = dict(adapter.factors) | {name: (one.w1, one.w2) for name, one in adapter.kroneckers.items()}
    broken = [name for name, pair in numbers.items() if not all(np.isfinite(x.astype(np.float32)).all() for x in pair)]
    if broken or not np.isfinite(adapter.alpha):
        what = f"{broken[0]} and {len(broken) - 1} more modules" if len(broken) > 1 else (broken or ["alpha"])[0]
        raise LensError(f"{where}: {what}: not finite (NaN or infinity); the file is damaged, or its training failed")
