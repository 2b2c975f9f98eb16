"""One strict table a network: the mesh axes of every parameter. A parameter without a rule is an error."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lens_jax.errors import LensError

# Path of a parameter, as a pattern -> the mesh axis of each of its dimensions.
Table = Mapping[str, tuple[str | None, ...]]
# A table for each named tree of a state.
Rules = Mapping[str, Table]

# Path of a parameter -> the mesh axis of each of its dimensions. Fused projections keep axes of their own (q/k/v,
# gate/up, heads), or a tensor axis could not cut them. Modulation is one vector a sample: not worth a tensor axis.
DENOISER_RULES: Table = {
    r"blocks/(image|text)/modulation/kernel": (None, "fsdp", None),
    r"blocks/(image|text)/modulation/bias": (None, None),
    r"blocks/(image|text)/norm(1|2|_q|_k)/scale": (None, None),
    r"blocks/(image|text)/qkv/kernel": (None, "fsdp", None, "tensor", None),
    r"blocks/(image|text)/qkv/bias": (None, None, "tensor", None),
    r"blocks/(image|text)/out/kernel": (None, "tensor", None, "fsdp"),
    r"blocks/(image|text)/out/bias": (None, None),
    r"blocks/(image|text)/gate_up/kernel": (None, "fsdp", None, "tensor"),
    r"blocks/(image|text)/down/kernel": (None, "tensor", "fsdp"),
    r"(image_in|time_in)/kernel": (None, "fsdp"),
    r"(text_in|time_out|modulation_out|image_out)/kernel": ("fsdp", None),
    r"(image_in|text_in|time_in|time_out|modulation_out|image_out)/bias": (None,),
    r"text_norm/scale": (None, None),
}


# Adapters of the denoiser (`models.lora`): A and B have the axes of the kernel beside them, and
# the rank, which is small and of any size, on every device.
LORA_RULES: Table = {
    r"blocks/(image|text)/(qkv|modulation)/a": (None, "fsdp", None),
    r"blocks/(image|text)/qkv/b": (None, None, None, "tensor", None),
    r"blocks/(image|text)/modulation/b": (None, None, None),
    r"blocks/(image|text)/out/a": (None, "tensor", None, None),
    r"blocks/(image|text)/gate_up/a": (None, "fsdp", None, None),
    r"blocks/(image|text)/gate_up/b": (None, None, None, "tensor"),
    r"blocks/(image|text)/down/a": (None, "tensor", None),
    r"blocks/(image|text)/(out|down)/b": (None, None, "fsdp"),
    r"(image_in|time_in)/b": (None, "fsdp"),
    r"(text_in|time_out|modulation_out|image_out)/a": ("fsdp", None),
    r"(image_in|time_in)/a|(text_in|time_out|modulation_out|image_out)/b": (None, None),
}


# 84M parameters, and convolutions with 3 and 128 channels: whole on every device.
AUTOENCODER_RULES: Table = {
    r"(encoder|decoder)/.*": (),
    r"latent_statistics/(mean|variance|batches)": (),
    # The pixel codec in its place.
    r"mean|std": (),
}


# The experts are 91 % of the weights. Sharded along the outputs: 5,760 and 2,880 rows, and not the 32 experts.
GPT_OSS_RULES: Table = {
    r"embed|unembed": (None, "fsdp"),
    r"layers/(q|k|v)/kernel": (None, "fsdp", None, None),
    r"layers/out/kernel": (None, None, None, "fsdp"),
    r"layers/(q|k|v)/bias": (None, None, None),
    r"layers/experts/(gate_up|down)/blocks": (None, None, "fsdp", None, None),
    r"layers/experts/(gate_up|down)/scales": (None, None, "fsdp", None),
    r"layers/experts/(gate_up|down)/kernel": (None, None, None, "fsdp"),
    r"layers/experts/(gate_up|down)/bias": (None, None, None),
    r"layers/router/kernel": (None, None, None),
    r"layers/(out|router)/bias|layers/sinks|layers/(attention|mlp)_norm/scale": (None, None),
    r"norm/scale": (None,),
}


def spec_of(rules: Table, path: str, shape: tuple[int, ...], mesh) -> PartitionSpec:
    """The layout of one parameter; LensError when no rule names it or an axis does not divide it."""
    axes = next((axes for pattern, axes in rules.items() if re.fullmatch(pattern, path)), None)
    if axes is None:
        raise LensError(
            f"no sharding rule for the parameter {path} {list(shape)}; add one to lens_jax/parallel/rules.py"
        )
    if axes and len(axes) != len(shape):
        raise LensError(f"the sharding rule of {path} is {axes}, for {len(axes)} dimensions; it has {list(shape)}")
    for axis, size in zip(axes, shape):
        if axis and size % mesh.shape[axis]:
            best = math.gcd(size, mesh.shape[axis])
            raise LensError(
                f"mesh.{axis} is {mesh.shape[axis]}, which does not divide {size} of {path} {list(shape)}; {best} does"
            )
    # An axis of one device cuts nothing; named all the same, it would ask for collectives of one.
    return PartitionSpec(*(axis if axis and mesh.shape[axis] > 1 else None for axis in axes))


def tree_specs(rules: Table, tree: Any, mesh) -> Any:
    """The layout of every leaf of a tree of parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: spec_of(rules, path_of(path), leaf.shape, mesh), tree)


def path_of(path) -> str:
    return "/".join(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
