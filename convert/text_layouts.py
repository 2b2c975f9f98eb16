"""The text encoder as other programs write it, under the names of transformers (release 6.1, 6.3).

Experts come out in one of the two forms transformers has: packed, `gate_up_proj_blocks` and `gate_up_proj_scales`; or
dense, `gate_up_proj` [experts, in, out]. In both, rows of gate and up take turns.
"""

import re
from collections.abc import Mapping

import numpy as np

from lens_jax.convert import quantized
from lens_jax.convert.folder import BUNDLED
from lens_jax.convert.gguf import BLOCKS, SCALES
from lens_jax.convert.table import Spec, Tensors, specs_of

# What no other network has: the learned sinks of attention.
SINKS = "layers.0.self_attn.sinks"
LLAMA_CPP = ("blk.0.attn_sinks.weight", "blk.0.attn_sinks")
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
      tensors: by the names of transformers; of ComfyUI, with a prefix or without, plain or with NVFP4 experts; or of
        llama.cpp. Other components of a bundle are left out.
      source: the file or folder, for messages.

    A file of ComfyUI without vocabulary head comes without the final norm too, which only the head needs. Names that
    belong to no layout stay, to be reported. Raises LensError for quantised tensors that do not fit.
    """
    specs = specs_of(tensors)
    if any(name in specs for name in LLAMA_CPP):
        return _from_llama_cpp(tensors, source)
    sinks = [name for name in specs if name.endswith(SINKS)]
    if len(sinks) != 1:
        return Tensors(specs, tensors.__getitem__)
    return _from_comfy(tensors, sinks[0].removesuffix(SINKS), source)


def is_packed(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether the experts of `as_transformers` are packed MXFP4."""
    return any(_EXPERTS in name and name.endswith("_blocks") for name in tensors)


def tokenizer_json(tensors: Mapping[str, np.ndarray]) -> bytes | None:
    """The tokenizer.json within the weights, where a file has it."""
    names = [name for name, spec in specs_of(tensors).items() if name.endswith(TOKENIZER) and spec.dtype == np.uint8]
    return tensors[names[0]].tobytes() if names else None


def _from_comfy(tensors: Mapping[str, np.ndarray], prefix: str, source: str) -> Tensors:
    """Names behind `prefix`, which ends in `model.` in transformers and does not in ComfyUI."""
    specs, plain = specs_of(tensors), quantized.dequantize(tensors, source)
    outer = prefix.removesuffix("model.")
    origin, transposed = {}, set()
    for name in plain:
        new = name
        if name.endswith(TOKENIZER) or (outer and not name.startswith(outer) and name.startswith(BUNDLED)):
            continue
        if name.startswith(outer):
            new = name[len(outer) :]
            if outer == prefix and new != "lm_head.weight":
                new = f"model.{new}"
        base, _, last = new.rpartition(".")
        if _EXPERTS in new and last == "bias":
            new = f"{base}_bias"
        elif _EXPERTS in new and last == "weight" and f"{name}_scale" in specs:
            new = base  # NVFP4, which lies as [experts, out, in]
            transposed.add(new)
        origin[new] = name
    if outer == prefix and "lm_head.weight" not in origin:
        origin.pop("model.norm.weight", None)

    def read(new: str) -> np.ndarray:
        array = plain[origin[new]]
        return array.swapaxes(-1, -2) if new in transposed else array

    specs = {new: plain.specs[name] for new, name in origin.items()}
    specs.update({new: _swapped(specs[new]) for new in transposed})
    return Tensors(specs, read)


def _from_llama_cpp(tensors: Mapping[str, np.ndarray], source: str) -> Tensors:
    """Experts stay packed where all are MXFP4."""
    specs = specs_of(tensors)
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
