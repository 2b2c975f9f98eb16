"""The denoiser of the release: `transformer/`, class LensTransformer2DModel."""

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import traverse_util

from lens_jax.convert import prefixes, quantized, table
from lens_jax.convert.folder import check_size, read_json, read_size
from lens_jax.convert.table import Rule, Tensors
from lens_jax.errors import LensError
from lens_jax.models import denoiser
from lens_jax.models.denoiser import DenoiserConfig

# Much more than any release has: a config is an untrusted file, and a table of 10⁹ layers would never end.
_MAX_LAYERS = 1024


def config_from_release(values: Mapping, where: str, **overrides) -> DenoiserConfig:
    """Our config for a `transformer/config.json` of the release (1.3); `overrides` set compute options.

    Raises LensError for a key that is missing or a value that this model cannot have.
    """
    size = functools.partial(read_size, values, where=where)
    for key in ("gate_mlp", "rms_norm", "multi_layer_encoder_feature"):
        if values.get(key) is not True:
            raise LensError(f"{where}: {key} is {values.get(key)!r:.80}; accepted: true")
    if size("patch_size") ** 2 * size("out_channels") != size("in_channels"):
        raise LensError(f"{where}: in_channels must be patch_size² x out_channels")
    axes, taps = values.get("axes_dims_rope"), values.get("selected_layer_index")
    if not isinstance(axes, list) or len(axes) != 3:
        raise LensError(f"{where}: axes_dims_rope is {axes!r:.80}; accepted: a list of three sizes")
    if not isinstance(taps, list) or not 1 <= len(taps) <= _MAX_LAYERS:
        raise LensError(f"{where}: selected_layer_index is {taps!r:.80}; accepted: a list of layers")
    if any(type(tap) is not int or not 0 <= tap < _MAX_LAYERS for tap in taps) or len(set(taps)) < len(taps):
        raise LensError(f"{where}: selected_layer_index is {taps!r:.80}; accepted: different layers, counted from 0")
    return DenoiserConfig(
        layers=size("num_layers", limit=_MAX_LAYERS),
        heads=size("num_attention_heads"),
        head_dim=size("attention_head_dim"),
        latent_channels=size("in_channels"),
        text_width=size("enc_hidden_dim"),
        text_layers=len(taps),
        rope_axes=tuple(check_size(axis, "axes_dims_rope", where) for axis in axes),
        **overrides,
    )


def read_config(path: Path, **overrides) -> DenoiserConfig:
    """`config_from_release` for a file."""
    return config_from_release(read_json(path), str(path), **overrides)


def config_to_release(config: DenoiserConfig, text_taps: tuple[int, ...] = (5, 11, 17, 23)) -> dict:
    """A `transformer/config.json` of the release; `text_taps` are the encoder's layers, which ours does not know.

    LensError for what the release has no place for.
    """
    if len(text_taps) != config.text_layers:
        raise LensError(f"{len(text_taps)} text_taps for a model that reads {config.text_layers} text layers")
    if config.hidden != int(config.width / 3 * 8) or config.latent_channels % 4:
        raise LensError("the release has no place for this model.mlp_width or model.latent_channels")
    if config.rope_theta != DenoiserConfig.rope_theta:
        raise LensError(f"the release has no place for model.rope_theta {config.rope_theta:g}")
    return {
        "_class_name": "LensTransformer2DModel",
        "_diffusers_version": "0.37.1",
        "attention_head_dim": config.head_dim,
        "axes_dims_rope": list(config.rope_axes),
        "enc_hidden_dim": config.text_width,
        "gate_mlp": True,
        "in_channels": config.latent_channels,
        "inner_dim": config.width,
        "multi_layer_encoder_feature": True,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "out_channels": config.latent_channels // 4,
        "patch_size": 2,
        "rms_norm": True,
        "selected_layer_index": list(text_taps),
    }


def rules(config: DenoiserConfig) -> list[Rule]:
    """All tensors of the release: 26 a block and 12 + `text_layers` outside; 1,264 for the released size (2.1).

    In the order of the PyTorch module, which decides what goes into which shard.
    """
    width, hidden = config.width, config.hidden
    result = []

    def dense(name: str, path: str, inputs: int, outputs: int, index=(), bias=True):
        result.append(
            Rule(f"{name}.weight", (outputs, inputs), f"{path}/kernel", index, table.linear, table.linear_back)
        )
        if bias:
            result.append(Rule(f"{name}.bias", (outputs,), f"{path}/bias", index))

    def norm(name: str, path: str, size: int, index=()):
        result.append(Rule(f"{name}.weight", (size,), f"{path}/scale", index))

    dense("time_text_embed.timestep_embedder.linear_1", "time_in", 256, width)
    dense("time_text_embed.timestep_embedder.linear_2", "time_out", width, width)
    for i in range(config.text_layers):
        norm(f"txt_norm.{i}", "text_norm", config.text_width, (i,))
    dense("txt_in", "text_in", config.text_layers * config.text_width, width)
    dense("img_in", "image_in", config.latent_channels, width)
    for i in range(config.layers):
        attention = f"transformer_blocks.{i}.attn"
        norm(f"{attention}.norm_q", "blocks/image/norm_q", config.head_dim, (i,))
        norm(f"{attention}.norm_k", "blocks/image/norm_k", config.head_dim, (i,))
        norm(f"{attention}.norm_added_q", "blocks/text/norm_q", config.head_dim, (i,))
        norm(f"{attention}.norm_added_k", "blocks/text/norm_k", config.head_dim, (i,))
        dense(f"{attention}.img_qkv", "blocks/image/qkv", width, 3 * width, (i,))
        dense(f"{attention}.txt_qkv", "blocks/text/qkv", width, 3 * width, (i,))
        dense(f"{attention}.to_out.0", "blocks/image/out", width, width, (i,))
        dense(f"{attention}.to_add_out", "blocks/text/out", width, width, (i,))
        for theirs, ours in (("img", "blocks/image"), ("txt", "blocks/text")):
            stream = f"transformer_blocks.{i}.{theirs}"
            dense(f"{stream}_mod.1", f"{ours}/modulation", width, 6 * width, (i,))
            norm(f"{stream}_norm1", f"{ours}/norm1", width, (i,))
            norm(f"{stream}_norm2", f"{ours}/norm2", width, (i,))
            # w2(silu(w1 x) * w3 x): w1 is the gate, w3 the other factor.
            dense(f"{stream}_mlp.w1", f"{ours}/gate_up", width, hidden, (i, slice(None), 0), bias=False)
            dense(f"{stream}_mlp.w2", f"{ours}/down", hidden, width, (i,), bias=False)
            dense(f"{stream}_mlp.w3", f"{ours}/gate_up", width, hidden, (i, slice(None), 1), bias=False)
    dense("norm_out.linear", "modulation_out", width, 2 * width)
    dense("proj_out", "image_out", width, config.latent_channels)
    return result


def template(config: DenoiserConfig) -> dict:
    """Our leaves by path, as shapes and dtypes."""
    return traverse_util.flatten_dict(denoiser.abstract_params(config), sep="/")


def read(config: DenoiserConfig, tensors: Mapping[str, np.ndarray], source: str) -> Tensors:
    """The tensors of the release by name, made when they are read; accepts what `from_release` accepts."""
    wanted = rules(config)
    bare = prefixes.strip(tensors, [rule.name for rule in wanted], source)
    found = _released_names(quantized.dequantize(bare, source), wanted)
    table.check(wanted, found.specs, source)
    return found


# Names that others give to the modules of a block, for those of the release.
_OTHER_NAMES = {
    "img_mod.1.": ("img_mod.", "img_mod.layers.1."),
    "txt_mod.1.": ("txt_mod.", "txt_mod.layers.1."),
    "attn.to_out.0.": ("attn.to_out.", "attn.to_out.layers.0."),
}
# The parts that some keep apart of a fused projection.
_PARTS = {
    "attn.img_qkv.": ("attn.to_q.", "attn.to_k.", "attn.to_v."),
    "attn.txt_qkv.": ("attn.add_q_proj.", "attn.add_k_proj.", "attn.add_v_proj."),
}


def _released_names(tensors: Tensors, wanted: list[Rule]) -> Tensors:
    """Tensors whose modules are named as MLX does, or whose q, k and v lie apart, by the names of the release."""
    names, groups = {}, {}
    for rule in wanted:
        if rule.name in tensors:
            continue
        for ours, others in _OTHER_NAMES.items():
            found = [
                old for other in others if (old := rule.name.replace(ours, other)) in tensors and ours in rule.name
            ]
            names.update(dict.fromkeys(found[:1], rule.name))
        for ours, parts in _PARTS.items():
            apart = tuple(rule.name.replace(ours, part) for part in parts)
            if ours in rule.name and all(name in tensors for name in apart):
                groups[rule.name] = apart
    return prefixes.stacked(prefixes.renamed(tensors, names), groups)


def leaves(config: DenoiserConfig, tensors: Mapping[str, np.ndarray], source: str) -> Tensors:
    """Our leaves by path in `config.param_dtype`, made one at a time: at most 2.7 GB for the released float32 model.

    Accepts what `from_release` accepts, and checks it before the first leaf is made.
    """
    return table.leaves(rules(config), read(config, tensors, source), template(config))


def from_release(config: DenoiserConfig, tensors: Mapping[str, np.ndarray], source: str) -> dict:
    """Our parameter tree in `config.param_dtype`, as numpy arrays.

    Args:
      tensors: named as in the release or with a prefix of 6.1; float32, bfloat16, float16, MXFP8, or from GGUF.
      source: the file or folder, for messages.

    Raises LensError that lists every tensor that is missing, unknown or misshapen.
    """
    return traverse_util.unflatten_dict(dict(leaves(config, tensors, source)), sep="/")


def to_release(config: DenoiserConfig, params: Mapping, dtype: np.dtype | None = None) -> Tensors:
    """The tensors of the release from our tree, made one at a time, in `dtype` or that of the tree."""
    return table.to_release(rules(config), traverse_util.flatten_dict(params, sep="/"), dtype)
