"""The text encoder as other programs write it, under the names of transformers (release 6.1, 6.3).

Experts come out in one of the two forms transformers has: packed, `gate_up_proj_blocks` and `gate_up_proj_scales`; or
dense, `gate_up_proj` [experts, in, out]. In both, rows of gate and up take turns.
"""

import re
from collections.abc import Mapping

import numpy as np

from lens_jax.convert import prefixes, quantized
from lens_jax.convert.gguf import BLOCKS, SCALES
from lens_jax.convert.prefixes import BUNDLED
from lens_jax.convert.table import Spec, Tensors, specs_of

# What no other network has: the learned sinks of attention.
SINKS = "layers.0.self_attn.sinks"
LLAMA_CPP = ("blk.0.attn_sinks.weight", "blk.0.attn_sinks")
# OpenAI's own files, in the folder `original/` of its repository.
OPENAI = "block.0.attn.sinks"
# ComfyUI keeps the tokenizer.json in the weights, as bytes.
TOKENIZER = "tokenizer_json"

_EXPERTS = ".mlp.experts."
# The modules of a layer in transformers; llama.cpp splits the first of the experts' into two.
_MODULES = (
    *("input_layernorm", "post_attention_layernorm", "mlp.router"),
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "sinks")),
    *(f"mlp.experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)
_OUTER = ("model.embed_tokens", "model.norm", "lm_head")
_LLAMA_CPP_NAME = re.compile(r"((?:blk\.\d+\.)?\w+)(\.weight|\.bias)?(\.blocks|\.scales)?")


def as_transformers(tensors: Mapping[str, np.ndarray], source: str) -> Tensors:
    """The tensors of a text encoder by their names in transformers, made when they are read.

    Args:
      tensors: by the names of transformers; of ComfyUI or MLX, plain or quantised; of llama.cpp; or of OpenAI; with a
        prefix or without. Other components of a bundle are left out.
      source: the file or folder, for messages.

    A file of ComfyUI without vocabulary head comes without the final norm too, which only the head needs. Names that
    belong to no layout stay, to be reported. Raises LensError for quantised tensors that do not fit.
    """
    for mark, read in ((SINKS, _from_comfy), (OPENAI, _from_openai), *((mark, _from_llama_cpp) for mark in LLAMA_CPP)):
        heads = [name.removesuffix(mark) for name in tensors if name.endswith(mark)]
        if len(heads) == 1:
            return read(_without_others(tensors, heads[0].removesuffix("model.")), heads[0], source)
    return Tensors(specs_of(tensors), tensors.__getitem__)


def _without_others(tensors: Mapping[str, np.ndarray], prefix: str) -> Tensors:
    """Without the other components of a bundle, whose names do not begin with `prefix`, and the tokenizer."""
    ours = lambda name: name.startswith(prefix) or not name.startswith(BUNDLED)
    specs = {name: spec for name, spec in specs_of(tensors).items() if not prefix or ours(name)}
    return Tensors({name: s for name, s in specs.items() if not name.endswith(TOKENIZER)}, tensors.__getitem__)


def is_packed(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether the experts of `as_transformers` are packed MXFP4."""
    return any(_EXPERTS in name and name.endswith("_blocks") for name in tensors)


def tokenizer_json(tensors: Mapping[str, np.ndarray]) -> bytes | None:
    """The tokenizer.json within the weights, where a file has it."""
    names = [name for name, spec in specs_of(tensors).items() if name.endswith(TOKENIZER) and spec.dtype == np.uint8]
    return tensors[names[0]].tobytes() if names else None


def _from_comfy(tensors: Tensors, prefix: str, source: str) -> Tensors:
    """Names behind `prefix`, which ends in `model.` in transformers and does not in ComfyUI."""
    plain = quantized.dequantize(tensors, source)
    outer = prefix.removesuffix("model.")
    origin, transposed = {}, set()
    for name in plain:
        new = name
        if name.startswith(outer):
            new = name[len(outer) :]
            if outer == prefix and new != "lm_head.weight":
                new = f"model.{new}"
        base, _, last = new.rpartition(".")
        if _EXPERTS in new and last == "bias":
            new = f"{base}_bias"
        elif _EXPERTS in new and last == "weight":
            new = base  # a module of experts, which lies as [experts, out, in]
            transposed.add(new)
        origin[new] = name
    if outer == prefix and "lm_head.weight" not in origin:
        origin.pop("model.norm.weight", None)

    def read(new: str) -> np.ndarray:
        array = plain[origin[new]]
        return array.swapaxes(-1, -2) if new in transposed else array

    specs = {new: plain.specs[name] for new, name in origin.items()}
    specs.update({new: _swapped(specs[new]) for new in transposed if len(specs[new].shape) > 1})
    return _gates_and_ups(Tensors(specs, read))


def _gates_and_ups(tensors: Tensors) -> Tensors:
    """Dense gates and ups of experts that lie apart, as in MLX, taking turns on the last axis."""
    specs, parts = dict(tensors.specs), {}
    for gate in tensors:
        up, new = gate.replace(".gate_proj", ".up_proj"), gate.replace(".gate_proj", ".gate_up_proj")
        if _EXPERTS in gate and up != gate and up in specs and specs[up] == specs[gate] and specs[up].shape:
            spec = specs.pop(gate)
            del specs[up]
            specs[new], parts[new] = Spec(spec.dtype, (*spec.shape[:-1], 2 * spec.shape[-1])), (gate, up)

    def read(name: str) -> np.ndarray:
        if name not in parts:
            return tensors[name]
        return np.stack([np.array(tensors[part]) for part in parts[name]], -1).reshape(specs[name].shape)

    return Tensors(specs, read)


_OPENAI_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
    "attn.norm.scale": "input_layernorm.weight",
    "attn.sinks": "self_attn.sinks",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.out.bias": "self_attn.o_proj.bias",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    **{
        f"mlp.mlp{i}_{theirs}": f"mlp.experts.{ours}_proj_{end}"
        for i, ours in ((1, "gate_up"), (2, "down"))
        for theirs, end in (("weight.blocks", "blocks"), ("weight.scales", "scales"), ("bias", "bias"))
    },
}
_OPENAI_BLOCK = re.compile(r"block\.(\d+)\.(.+)")


def _from_openai(tensors: Tensors, prefix: str, source: str) -> Tensors:
    """OpenAI's own names: the same numbers, packed alike, but for q, k and v, which lie one after another."""
    specs, origin, rows = {}, {}, {}
    for name, spec in tensors.specs.items():
        short = name.removeprefix(prefix)
        block = _OPENAI_BLOCK.fullmatch(short)
        layer, module = (f"model.layers.{block[1]}.", block[2]) if block else ("", short)
        out = f"{prefix}block.{block[1]}.attn.out.weight" if block else ""
        if (
            module in ("attn.qkv.weight", "attn.qkv.bias")
            and len(tensors.specs.get(out, spec).shape) == 2
            and spec.shape
        ):
            q = tensors.shape(out)[1] if out in tensors else 0
            kv = (spec.shape[0] - q) // 2
            for part, start, count in (("q", 0, q), ("k", q, kv), ("v", q + kv, spec.shape[0] - q - kv)):
                new = f"{layer}self_attn.{part}_proj.{module.rpartition('.')[2]}"
                specs[new], origin[new] = Spec(spec.dtype, (max(count, 0), *spec.shape[1:])), name
                rows[new] = slice(start, start + count)
        else:
            new = layer + _OPENAI_NAMES[module] if module in _OPENAI_NAMES else name
            specs[new], origin[new] = spec, name
    return Tensors(specs, lambda new: tensors[origin[new]][rows[new]] if new in rows else tensors[origin[new]])


def _from_llama_cpp(tensors: Tensors, prefix: str, source: str) -> Tensors:
    """Experts stay packed where all are MXFP4."""
    tensors = prefixes.renamed(tensors, {name: name.removeprefix(prefix) for name in tensors})
    specs = tensors.specs
    experts = {name: spec for name, spec in specs.items() if "_exps.weight" in name}
    packed = all(name.endswith((BLOCKS, SCALES)) for name in experts)
    rest = {name: spec for name, spec in specs.items() if not packed or name not in experts}
    plain = quantized.dequantize(Tensors(rest, tensors.__getitem__), source)
    found = {**plain.specs, **experts} if packed else plain.specs
    modules = _llama_cpp_modules(specs)
    # By the new name the old one, or the two of gate and up.
    origin: dict[str, list[str]] = {}
    # Gate before up, whatever the order of the file.
    for name in sorted(found, key=lambda name: "ffn_up_exps" in name):
        origin.setdefault(_from_llama_cpp_name(name, modules), []).append(name)
    for new, names in list(origin.items()):
        shapes = {found[name].shape for name in names}
        if len(names) != 1 + (".gate_up_proj" in new) or (
            len(names) == 2 and (len(shapes) > 1 or len(shapes.pop()) < 2)
        ):
            origin.update({name: [name] for name in origin.pop(new)})  # to be reported
    dense = {new for new in origin if _EXPERTS in new and new.endswith("_proj")}

    def spec(new: str) -> Spec:
        first, *others = (found[name] for name in origin[new])
        dtype = first.dtype if all(other.dtype == first.dtype for other in others) else np.dtype(np.float32)
        shape = (first.shape[0], 2 * first.shape[1], *first.shape[2:]) if others else first.shape
        return _swapped(Spec(dtype, shape)) if new in dense else Spec(dtype, shape)

    def read(new: str) -> np.ndarray:
        parts = [(plain if name in plain else tensors)[name] for name in origin[new]]
        array = np.stack(parts, 2).reshape(parts[0].shape[0], -1, *parts[0].shape[2:]) if len(parts) > 1 else parts[0]
        return array.swapaxes(-1, -2) if new in dense else array

    return Tensors({new: spec(new) for new in origin}, read)


def _llama_cpp_modules(names: Mapping) -> dict[str, str]:
    """llama.cpp's name of each module -> that of transformers, from the table of the package `gguf`."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    layers = len({name.split(".")[1] for name in names if name.startswith("blk.")})
    ours = [*_OUTER, *(f"model.layers.{i}.{module}" for i in range(layers) for module in _MODULES)]
    table = get_tensor_name_map(MODEL_ARCH.GPT_OSS, layers)
    return {table.get_name(name): name for name in ours}


def _from_llama_cpp_name(name: str, modules: Mapping[str, str]) -> str:
    """The name in transformers; gate and up of the experts get the same."""
    match = _LLAMA_CPP_NAME.fullmatch(name)
    # Files of the first days have the second spelling.
    module = match and modules.get(match[1].replace(".attn_post_norm", ".post_attention_norm"))
    if not module:
        return name
    kind, part = match[2] or "", match[3] or ""
    if module.endswith(".sinks"):
        return module
    if _EXPERTS not in module:
        return module + kind + part
    base = module.replace(".gate_proj", ".gate_up_proj").replace(".up_proj", ".gate_up_proj")
    return base + ("_bias" if kind == ".bias" else part.replace(".", "_"))


def _swapped(spec: Spec) -> Spec:
    """Of a tensor whose last two axes are swapped."""
    return Spec(spec.dtype, (*spec.shape[:-2], *spec.shape[:-3:-1]))
