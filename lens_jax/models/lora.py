"""Low-rank adapters of the denoiser (LoRA): y = W x + (alpha / rank) B A x, with W frozen.

An adapter is a tree of its own beside the denoiser's parameters, with the same paths: `blocks/image/qkv/a`
[layers, width, rank] and `blocks/image/qkv/b` [layers, rank, 3, heads, head_dim] beside
`blocks/image/qkv/kernel` [layers, width, 3, heads, head_dim]. Stacked like the blocks, it is scanned with them. What
computes with a tree takes it as it is, y = W x + B A x: `scaled` puts alpha / rank, or any other factor, into B.
"""

import dataclasses
import fnmatch
import functools
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name as keep
from jax.sharding import PartitionSpec

from lens_jax.errors import LensError, nearest
from lens_jax.models.layers import layout

# Every linear layer of ours that can have an adapter, with its modules in the release; in a block their names begin
# with `transformer_blocks.<i>.`. Two modules share `gate_up`, each with an adapter of its own.
MODULES: dict[str, tuple[str, ...]] = {
    "blocks/image/qkv": ("attn.img_qkv",),
    "blocks/text/qkv": ("attn.txt_qkv",),
    "blocks/image/out": ("attn.to_out.0",),
    "blocks/text/out": ("attn.to_add_out",),
    "blocks/image/gate_up": ("img_mlp.w1", "img_mlp.w3"),
    "blocks/image/down": ("img_mlp.w2",),
    "blocks/text/gate_up": ("txt_mlp.w1", "txt_mlp.w3"),
    "blocks/text/down": ("txt_mlp.w2",),
    "blocks/image/modulation": ("img_mod.1",),
    "blocks/text/modulation": ("txt_mod.1",),
    "image_in": ("img_in",),
    "text_in": ("txt_in",),
    "time_in": ("time_text_embed.timestep_embedder.linear_1",),
    "time_out": ("time_text_embed.timestep_embedder.linear_2",),
    "modulation_out": ("norm_out.linear",),
    "image_out": ("proj_out",),
}
# Targets that stand for several.
GROUPS = {
    "attention": ("img_qkv", "txt_qkv", "to_out.0", "to_add_out"),
    "mlp": ("img_mlp.*", "txt_mlp.*"),
    "modulation": ("img_mod.1", "txt_mod.1"),
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Train a low-rank adapter beside frozen parameters, instead of the parameters."""

    # Rank of the adapter; 0 trains the parameters themselves. The report's reinforcement learning has 64.
    rank: int = 0
    # What the adapter adds is times alpha / rank; 0 is the rank, so times 1. The report's is 128 for a rank of 64.
    alpha: float = 0.0
    # Which linear layers have one: attention, mlp, modulation, or modules of the release by pattern (img_qkv, to_out.0,
    # img_mlp.*, proj_out). The report does not say which; these four a block are what most trainers of Lens take.
    targets: tuple[str, ...] = ("attention",)
    # Share of the inputs of the adapter, and of nothing else, that is left out at random in training.
    dropout: float = 0.0

    def __post_init__(self):
        if self.rank < 0:
            raise LensError(f"lora.rank is {self.rank}; it must be at least 1, or 0 for no adapter")
        if not 0 <= self.alpha < float("inf"):
            raise LensError(f"lora.alpha is {self.alpha}; it must be positive, or 0 for the rank")
        if not 0 <= self.dropout < 1:
            raise LensError(f"lora.dropout is {self.dropout}; it must be at least 0 and below 1")
        paths_of(self.targets)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank if self.alpha else 1.0


class Dropout(NamedTuple):
    """Of the inputs of an adapter, in training."""

    # Share that is left out.
    rate: float
    key: jax.Array


def paths_of(targets: tuple[str, ...]) -> list[str]:
    """The layers, by path in our tree, that have an adapter; LensError for a target that is none."""
    modules = [module for names in MODULES.values() for module in names]
    found = set()
    for target in targets:
        patterns = [form for one in GROUPS.get(target, (target,)) for form in (one, f"*.{one}")]
        matched = {module for module in modules for pattern in patterns if fnmatch.fnmatchcase(module, pattern)}
        if not matched:
            known = (*GROUPS, *modules)
            raise LensError(
                f"lora.targets: {target!r}{nearest(target, known)} matches nothing; accepted: {', '.join(known)}, or "
                "a pattern"
            )
        found |= matched
    if not found:
        raise LensError(f"lora.targets is empty; accepted: {', '.join((*GROUPS, *modules))}, or a pattern")
    for names in MODULES.values():
        if 0 < len(found & set(names)) < len(names):
            raise LensError(f"lora.targets has {(found & set(names)).pop()} alone; {' and '.join(names)} are one layer")
    return [path for path, names in MODULES.items() if names[0] in found]


# No adapter: the parameters are trained.
OFF = LoraConfig()


def shapes(path: str, kernel: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B beside the kernel of a layer; in a block both begin with the layer axis."""
    stacked = path.startswith("blocks/")
    layers, kernel = (kernel[:1], kernel[1:]) if stacked else ((), kernel)
    if path.endswith("/gate_up"):
        width, two, hidden = kernel
        return (*layers, width, two, rank), (*layers, two, rank, hidden)
    inputs = _inputs(path)
    return (*layers, *kernel[:inputs], rank), (*layers, rank, *kernel[inputs:])


def _inputs(path: str) -> int:
    """Axes of a kernel that are summed over, a layer axis not counted."""
    return 2 if path.endswith("/out") else 1


def init(config: LoraConfig, denoiser: dict, key: jax.Array) -> dict:
    """A fresh adapter, float32: A as PEFT draws it, uniform within 1 / sqrt(inputs), and B zero, so it adds nothing.

    denoiser: the parameters it is for, or their shapes.
    """
    kernels, made = flatten_dict(denoiser, sep="/"), {}
    for i, path in enumerate(paths_of(config.targets)):
        kernel = kernels[f"{path}/kernel"].shape
        a, b = shapes(path, kernel, config.rank)
        inner = kernel[1:] if path.startswith("blocks/") else kernel
        fan_in = 1
        for size in inner[: _inputs(path)]:
            fan_in *= size
        bound = fan_in**-0.5
        made[f"{path}/a"] = jax.random.uniform(jax.random.fold_in(key, i), a, jnp.float32, -bound, bound)
        made[f"{path}/b"] = jnp.zeros(b, jnp.float32)
    return unflatten_dict(made, sep="/")


def abstract(config: LoraConfig, denoiser: dict) -> dict:
    """Shapes and dtypes of `init` without allocating anything."""
    return jax.eval_shape(functools.partial(init, config, denoiser), jax.random.key(0))


def parameter_count(config: LoraConfig, denoiser: dict) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(config, denoiser)))


def scaled(tree: dict, factor: float | jax.Array) -> dict:
    """The adapter that adds `factor` times as much."""
    if isinstance(factor, float) and factor == 1:
        return tree
    return jax.tree_util.tree_map_with_path(lambda path, x: x * factor if path[-1].key == "b" else x, tree)


def joined(trees: list[dict]) -> dict:
    """One adapter that adds what several add: their ranks side by side."""
    if len(trees) == 1:
        return trees[0]
    flat = [flatten_dict(tree, sep="/") for tree in trees]
    made = {}
    for path in dict.fromkeys(path for tree in flat for path in tree):
        parts = [tree[path] for tree in flat if path in tree]
        made[path] = jnp.concatenate(parts, rank_axis(path)) if len(parts) > 1 else parts[0]
    return unflatten_dict(made, sep="/")


def rank_axis(path: str) -> int:
    """The axis of a leaf of an adapter that has the rank."""
    if path.endswith("/a"):
        return -1
    return int(path.startswith("blocks/")) + int(path.endswith("/gate_up/b"))


def rank_of(tree: dict) -> int:
    """The largest rank in an adapter."""
    return max(leaf.shape[rank_axis(path)] for path, leaf in flatten_dict(tree, sep="/").items())


def merged(denoiser: dict, tree: dict) -> dict:
    """The parameters with the adapter in their kernels, W + B A: summed in float32, rounded to their dtype once."""
    flat, adapter = flatten_dict(denoiser, sep="/"), flatten_dict(tree, sep="/")
    for path in {path.rpartition("/")[0] for path in adapter}:
        kernel = flat[f"{path}/kernel"]
        one = functools.partial(_product, path.endswith("/gate_up"))
        a, b = (adapter[f"{path}/{name}"].astype(jnp.float32) for name in "ab")
        change = jax.vmap(one)(a, b) if path.startswith("blocks/") else one(a, b)
        flat[f"{path}/kernel"] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    return unflatten_dict(flat, sep="/")


def _product(paired: bool, a: jax.Array, b: jax.Array) -> jax.Array:
    """B A as the kernel of one layer. Exact products whatever the device's default precision is."""
    if paired:
        return jnp.einsum("wpr,prh->wph", a, b, precision="highest")
    return jnp.tensordot(a, b, 1, precision="highest")


class Adapters(NamedTuple):
    """The adapters of the layers of one module: `Adapters(...)(module, "qkv", x)` is its `qkv` with that of it."""

    # {"qkv": {"a", "b"}} of the layers that have one.
    tree: dict
    dropout: Dropout | None = None

    def __call__(self, module, name: str, x: jax.Array, **options) -> jax.Array:
        """`module.name(x)`, with what an adapter adds to it; `options` are those of the layer."""
        y = getattr(module, name)(x, **options)
        if name not in self.tree:
            return y
        if self.dropout is not None:
            # By the name, so that no two layers leave out the same.
            key = jax.random.fold_in(self.dropout.key, zlib.crc32(name.encode()))
            x = _dropped(x, self.dropout.rate, key)
        return y + _change(x, self.tree[name], name == "gate_up", layout(y))

    def of(self, part: str) -> "Adapters":
        """The adapters of a part of the module."""
        if self.dropout is None:
            return Adapters(self.tree.get(part, {}))
        key = jax.random.fold_in(self.dropout.key, zlib.crc32(part.encode()))
        return Adapters(self.tree.get(part, {}), self.dropout._replace(key=key))


NONE = Adapters({})


def _change(x: jax.Array, adapter: dict, paired: bool, place) -> jax.Array:
    """B A x in the dtype of x, laid out like the result of the layer."""
    a, b = adapter["a"].astype(x.dtype), adapter["b"].astype(x.dtype)
    inputs = a.ndim - 1 - paired
    lead, summed = "BS"[: x.ndim - inputs], "ijk"[:inputs]
    # The sum over inputs that are sharded over `tensor` is made where it is: of a few numbers a token.
    low_place = None
    if place is not None:
        low_place = PartitionSpec(*(*place.spec, None, None, None)[: len(lead)], *([None] * (1 + paired)))
    pair = "p" * paired
    low = keep(jnp.einsum(f"{lead}{summed},{summed}{pair}r->{lead}{pair}r", x, a, out_sharding=low_place), "lora")
    outputs = "lmn"[: b.ndim - 1 - paired]
    return jnp.einsum(f"{lead}{pair}r,{pair}r{outputs}->{lead}{pair}{outputs}", low, b, out_sharding=place)


def _dropped(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """x with a share of its numbers zero and the others larger for it."""
    place = layout(x)
    kept = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=place and place.spec)
    return jnp.where(kept, x / (1 - rate), 0)


def split(tree: dict | None, dropout: Dropout | None, layers: int) -> tuple[Adapters, dict, jax.Array | None]:
    """(the adapters outside the blocks, the tree of the blocks and a key a block for dropout, to be scanned)."""
    tree = tree or {}
    outside = {name: value for name, value in tree.items() if name != "blocks"}
    if dropout is None:
        return Adapters(outside), tree.get("blocks", {}), None
    key, *keys = jax.random.split(dropout.key, layers + 1)
    return Adapters(outside, dropout._replace(key=key)), tree.get("blocks", {}), jnp.stack(keys)
