"""The text encoder of the release: `text_encoder/`, GPT-OSS with packed MXFP4 experts (release 1.6, 2.3).

Where experts were quantised otherwise, the tables are those of a GPT-OSS that transformers saves without quantisation.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from lens_jax.convert import table, text_layouts
from lens_jax.convert.folder import read_json, read_size
from lens_jax.convert.place import place
from lens_jax.convert.table import Rule, Tensors
from lens_jax.errors import LensError
from lens_jax.models import gpt_oss
from lens_jax.models.gpt_oss import GptOssConfig
from lens_jax.models.mxfp4 import GROUP, GROUP_BYTES

# More layers than any model has: a table for 10⁷ of them would not fail but hang.
MAX_LAYERS = 1024
_BYTES = (np.dtype(np.uint8),)
_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
_HEAD = ("norm/scale", "unembed")
_HEAD_NAMES = ("model.norm.weight", "lm_head.weight")
_QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
# What must be there or absent, for these are what the code computes.
_FIXED = {
    "model_type": "gpt_oss",
    "hidden_act": "silu",
    "attention_bias": True,
    "tie_word_embeddings": False,
}
# Ours: (key of the release, what transformers assumes without it; None where it must be there).
_ROPE = {
    "rope_theta": ("rope_theta", None),
    "rope_factor": ("factor", None),
    "rope_original_context": ("original_max_position_embeddings", None),
    "rope_beta_fast": ("beta_fast", 32.0),
    "rope_beta_slow": ("beta_slow", 1.0),
    "rope_truncate": ("truncate", True),
}


def config_from_release(values: Mapping[str, Any], where: str, **overrides) -> GptOssConfig:
    """Our config for a `text_encoder/config.json`; `overrides` set compute options.

    Reads the rotary embedding from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (4), and
    refuses a file without either: plain rotary positions give features that are wrong by 5 % and look like noise.
    """
    for key, wanted in _FIXED.items():
        if values.get(key, wanted) != wanted:
            raise LensError(f"{where}: {key} is {_short(values[key])}; accepted: {wanted!r}")
    quantization = values.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if method not in ("mxfp4", None):
        raise LensError(f"{where}: quantization_config.quant_method must be 'mxfp4', or none for dense experts")
    layers = read_size(values, "num_hidden_layers", where, MAX_LAYERS)
    per_token = read_size(values, "num_experts_per_tok", where)
    if values.get("experts_per_token", per_token) != per_token:
        raise LensError(
            f"{where}: experts_per_token {_short(values['experts_per_token'])} contradicts num_experts_per_tok "
            f"{per_token}"
        )
    alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    if values.get("layer_types", alternating) != alternating:
        raise LensError(f"{where}: layer_types must be {layers} entries that alternate, sliding_attention first")
    dtype = values.get("dtype", values.get("torch_dtype", "bfloat16"))
    if dtype not in gpt_oss.DTYPES:
        raise LensError(f"{where}: dtype is {_short(dtype)}; accepted: {', '.join(gpt_oss.DTYPES)}")
    width, heads = read_size(values, "hidden_size", where), read_size(values, "num_attention_heads", where)
    return GptOssConfig(
        **{
            "layers": layers,
            "width": width,
            "hidden": read_size(values, "intermediate_size", where),
            "heads": heads,
            "kv_heads": read_size(values, "num_key_value_heads", where),
            "head_dim": read_size(values, "head_dim", where),
            "experts": read_size(values, "num_local_experts", where),
            "experts_per_token": per_token,
            "vocab": read_size(values, "vocab_size", where),
            "window": read_size(values, "sliding_window", where),
            "norm_eps": _number(values, "rms_norm_eps", where, 1e-5),
            "swiglu_alpha": _number(values, "swiglu_alpha", where, 1.702),
            "swiglu_limit": _number(values, "swiglu_limit", where, 7.0),
            "param_dtype": dtype,
            "packed": method is not None,
            **_rope(values, where),
            **overrides,
        }
    )


def from_openai(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of a config.json as transformers writes them, for OpenAI's own in `original/`; others as they are."""
    if "model_type" in values or not values.keys() >= _OPENAI.keys():
        return values
    released = config_to_release(gpt_oss.GPT_OSS_20B)
    rope = released["rope_parameters"] | {ours: values[key] for key, ours in _OPENAI_ROPE.items() if key in values}
    rope["original_max_position_embeddings"] = values.get("initial_context_length", 4096)
    old = {key: value for key, value in rope.items() if key != "rope_theta"}
    same = {key: value for key, value in values.items() if key in released}
    size = values["num_hidden_layers"]
    kinds = released["layer_types"] * MAX_LAYERS
    layers = kinds[:size] if type(size) is int and 0 < size <= MAX_LAYERS else []
    own = {ours: values[key] for key, ours in _OPENAI.items()}
    rotary = {"rope_parameters": rope, "rope_scaling": old, "rope_theta": rope["rope_theta"]}
    return {**released, **same, **own, **rotary, "layer_types": layers}


_OPENAI = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"} | {
    key: key for key in ("num_hidden_layers", "hidden_size", "head_dim", "num_attention_heads", "rope_theta")
}
_OPENAI_ROPE = {
    "rope_theta": "rope_theta",
    "rope_scaling_factor": "factor",
    "rope_ntk_alpha": "beta_slow",
    "rope_ntk_beta": "beta_fast",
}


def read_config(path: Path, **overrides) -> GptOssConfig:
    """`config_from_release` for a file."""
    return config_from_release(read_json(path), str(path), **overrides)


def config_to_release(config: GptOssConfig) -> dict[str, Any]:
    """A `text_encoder/config.json` of the release, with the rotary keys of transformers 4 and 5."""
    c = config
    values = {
        "architectures": ["GptOssForCausalLM"],
        **_FIXED,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": c.param_dtype,
        "eos_token_id": 200002,
        "experts_per_token": c.experts_per_token,
        "head_dim": c.head_dim,
        "hidden_size": c.width,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": c.hidden,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(c.layers)],
        "max_position_embeddings": 131072,
        "num_attention_heads": c.heads,
        "num_experts_per_tok": c.experts_per_token,
        "num_hidden_layers": c.layers,
        "num_key_value_heads": c.kv_heads,
        "num_local_experts": c.experts,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_type": "yarn", **{theirs: getattr(c, ours) for ours, (theirs, _) in _ROPE.items()}},
        "router_aux_loss_coef": 0.9,
        "sliding_window": c.window,
        "swiglu_alpha": c.swiglu_alpha,
        "swiglu_limit": c.swiglu_limit,
        "use_cache": True,
        "vocab_size": c.vocab,
    }
    return with_v4_rope(with_experts(values, c.packed))


def with_experts(values: Mapping[str, Any], packed: bool) -> dict[str, Any]:
    """The values of a config that speak of packed or of dense experts, whichever the weights have."""
    if packed == (values.get("quantization_config") is not None):
        return dict(values)
    rest = {key: value for key, value in values.items() if key != "quantization_config"}
    return {**rest, "quantization_config": _QUANTIZATION} if packed else rest


def with_v4_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config with the keys of both generations, so that transformers 4 and 5 read the same."""
    rope = _rope(values, "config")
    new = {theirs: rope[ours] for ours, (theirs, _) in _ROPE.items()}
    new["rope_type"] = "yarn"
    old = {key: value for key, value in new.items() if key != "rope_theta"}
    return {"rope_parameters": new, **values, "rope_theta": new["rope_theta"], "rope_scaling": old}


def rules(config: GptOssConfig, head: bool = True) -> list[Rule]:
    """All tensors of the release, 19 a layer and 3 more: 459 at the released size. Without `head`, 1 more.

    Dense experts are 17 a layer.
    """
    c, result = config, []
    square = lambda name, path, shape, index, **t: result.append(Rule(name, shape, path, index, **t))

    def dense(name, path, inputs, outputs, index):
        linear = {"forward": table.linear, "backward": table.linear_back}
        square(f"{name}.weight", f"{path}/kernel", (outputs, inputs), index, **linear)
        square(f"{name}.bias", f"{path}/bias", (outputs,), index)

    result.append(Rule("model.embed_tokens.weight", (c.vocab, c.width), "embed"))
    for i in range(c.layers):
        name, at = f"model.layers.{i}", (i,)
        square(f"{name}.input_layernorm.weight", "layers/attention_norm/scale", (c.width,), at)
        square(f"{name}.post_attention_layernorm.weight", "layers/mlp_norm/scale", (c.width,), at)
        for ours, theirs in _PROJECTIONS.items():
            count = c.heads if ours == "q" else c.kv_heads
            dense(f"{name}.self_attn.{theirs}", f"layers/{ours}", c.width, count * c.head_dim, at)
        dense(f"{name}.self_attn.o_proj", "layers/out", c.heads * c.head_dim, c.width, at)
        square(f"{name}.self_attn.sinks", "layers/sinks", (c.heads,), at)
        dense(f"{name}.mlp.router", "layers/router", c.width, c.experts, at)
        for part, outputs, inputs in (("gate_up", 2 * c.hidden, c.width), ("down", c.width, c.hidden)):
            theirs, ours = f"{name}.mlp.experts.{part}_proj", f"layers/experts/{part}"
            if c.packed:
                shape = (c.experts, outputs, inputs // GROUP)
                square(f"{theirs}_blocks", f"{ours}/blocks", (*shape, GROUP_BYTES), at, dtypes=_BYTES)
                square(f"{theirs}_scales", f"{ours}/scales", shape, at, dtypes=_BYTES)
            else:
                square(theirs, f"{ours}/kernel", (c.experts, inputs, outputs), at)
            square(f"{theirs}_bias", f"{ours}/bias", (c.experts, outputs), at)
    if head:
        result.append(Rule("model.norm.weight", (c.width,), "norm/scale"))
        result.append(Rule("lm_head.weight", (c.vocab, c.width), "unembed"))
    return result


def read(config: GptOssConfig, tensors: Mapping[str, np.ndarray], source: str) -> Tensors:
    """The tensors of the release by name, made when they are read, from any layout of `text_layouts`.

    Without the head where the source has neither of its two tensors.
    """
    found = text_layouts.as_transformers(tensors, source)
    table.check(rules(config, _has_head(found)), found.specs, source)
    return found


def leaves(config: GptOssConfig, tensors: Mapping[str, np.ndarray], source: str, head: bool = True) -> Tensors:
    """Our leaves by path, made one at a time, the head's if it is wanted and there.

    At most 6.4 GB, the packed gates of all layers of the 20B model; 25.5 GB where experts are dense.
    """
    found = read(config, tensors, source)
    head = head and _has_head(found)
    return table.leaves(rules(config, head), found, template(config, head))


def _has_head(tensors: Mapping[str, np.ndarray]) -> bool:
    return any(name in tensors for name in _HEAD_NAMES)


def template(config: GptOssConfig, head: bool = True) -> dict:
    """Our leaves by path, as shapes and dtypes."""
    return traverse_util.flatten_dict(gpt_oss.abstract_params(config, head), sep="/")


def from_release(config: GptOssConfig, tensors: Mapping[str, np.ndarray], source: str, head: bool = True) -> dict:
    """Our parameter tree from the tensors of the release: floats in `config.param_dtype`, packed experts as they are.

    Args:
      tensors: in any layout of `text_layouts`.
      head: also read the final norm and `lm_head` (1.2 GB at the released size), which features do not need.
    """
    made = leaves(config, tensors, source, head)
    return place(made, {path: like for path, like in template(config).items() if path in made})


def to_release(config: GptOssConfig, params: Mapping[str, Any]) -> Tensors:
    """The tensors of the release, each made when it is read; bit-identical to those that were read.

    LensError for a tree without the vocabulary head, for transformers would fill it with random numbers.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    missing = [path for path in _HEAD if path not in flat]
    if missing:
        raise LensError(f"text encoder: {', '.join(missing)} was not loaded, so the release cannot be written; load it")
    return table.to_release(rules(config), flat)


def _rope(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The rotary fields of our config from either generation of keys; both may be there if they agree."""
    found = []
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    if new is not None:
        found.append(("rope_parameters", new))
    if old is not None:
        theta = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
        found.append(("rope_scaling", {**old, **theta} if isinstance(old, Mapping) else old))
    if not found:
        raise LensError(f"{where}: neither rope_parameters nor rope_scaling is there; without YaRN features are wrong")
    read = [_yarn(rope, f"{where}: {key}") for key, rope in found]
    for field, (key, _) in _ROPE.items():
        if read[0][field] != read[-1][field]:
            raise LensError(
                f"{where}: rope_parameters.{key} {read[0][field]} contradicts rope_scaling's {read[-1][field]}"
            )
    if values.get("rope_theta", read[0]["rope_theta"]) != read[0]["rope_theta"]:
        raise LensError(f"{where}: rope_theta {_short(values['rope_theta'])} contradicts rope_parameters.rope_theta")
    return read[0]


def _yarn(rope: Any, where: str) -> dict[str, Any]:
    if not isinstance(rope, Mapping):
        raise LensError(f"{where} must be an object")
    kind = rope.get("rope_type", rope.get("type"))
    if kind != "yarn":
        raise LensError(f"{where}.rope_type is {_short(kind)}; accepted: 'yarn'")
    known = {*(key for key, _ in _ROPE.values()), "rope_type", "type", "attention_factor", "partial_rotary_factor"}
    for key in rope:
        if key not in known:
            raise LensError(f"{where}.{_short(key)} is unknown; accepted: {', '.join(sorted(known))}")
    result = {}
    for ours, (key, default) in _ROPE.items():
        if key == "truncate":
            result[ours] = rope.get(key, default)
            if not isinstance(result[ours], bool):
                raise LensError(f"{where}.truncate is {_short(result[ours])}; accepted: true, false")
        else:
            result[ours] = _number(rope, key, where, default)
    result["rope_original_context"] = int(result["rope_original_context"])
    if result["rope_factor"] < 1 or result["rope_theta"] <= 1:
        raise LensError(f"{where}: factor must be at least 1 and rope_theta above 1")
    # Written by some exporters; any other value than YaRN's own would be ignored here.
    factor = 0.1 * math.log(result["rope_factor"]) + 1
    given = rope.get("attention_factor")
    if given is not None and abs(_number(rope, "attention_factor", where) - factor) > 1e-6:
        raise LensError(f"{where}.attention_factor is {_short(given)}; accepted: {factor} or none")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise LensError(f"{where}.partial_rotary_factor is {_short(rope['partial_rotary_factor'])}; accepted: 1")
    return result


def _number(values: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        shown = "missing" if key not in values else _short(value)
        raise LensError(f"{where}: {key} is {shown}; accepted: a positive number")
    return float(value)


def _short(value: Any) -> str:
    return repr(value)[:80]
