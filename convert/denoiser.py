"""The denoiser of the release: `transformer/`, class LensTransformer2DModel."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import traverse_util

from lens_jax.convert import table
from lens_jax.convert.table import Rule
from lens_jax.errors import LensError
from lens_jax.models import denoiser
from lens_jax.models.denoiser import DenoiserConfig

_STREAMS = {
    # ours: (modulation, norms, qkv, per-head norms, way out, MLP) in the release
    "image": ("img_mod.1", "img_norm", "attn.img_qkv", ("attn.norm_q", "attn.norm_k"), "attn.to_out.0", "img_mlp"),
    "text": (
        "txt_mod.1",
        "txt_norm",
        "attn.txt_qkv",
        ("attn.norm_added_q", "attn.norm_added_k"),
        "attn.to_add_out",
        "txt_mlp",
    ),
}


def config_from_release(values: Mapping, where: str, **overrides) -> DenoiserConfig:
    """Our config for a `transformer/config.json` of the release; `overrides` set compute options."""
    try:
        if not (values["gate_mlp"] and values["rms_norm"] and values["multi_layer_encoder_feature"]):
            raise LensError(f"{where}: gate_mlp, rms_norm and multi_layer_encoder_feature must be true")
        if values["patch_size"] ** 2 * values["out_channels"] != values["in_channels"]:
            raise LensError(f"{where}: in_channels must be patch_size² x out_channels")
        return DenoiserConfig(
            layers=values["num_layers"],
            heads=values["num_attention_heads"],
            head_dim=values["attention_head_dim"],
            latent_channels=values["in_channels"],
            text_width=values["enc_hidden_dim"],
            text_layers=len(values["selected_layer_index"]),
            rope_axes=tuple(values["axes_dims_rope"]),
            **overrides,
        )
    except KeyError as error:
        raise LensError(f"{where}: the key {error} is missing") from None
    except TypeError as error:
        raise LensError(f"{where}: a value has the wrong type ({error})") from None


def read_config(path: Path, **overrides) -> DenoiserConfig:
    """`config_from_release` for a file."""
    try:
        return config_from_release(json.loads(path.read_text()), str(path), **overrides)
    except (OSError, ValueError) as error:
        raise LensError(f"{path}: cannot be read as JSON: {error}") from None


def rules(config: DenoiserConfig) -> list[Rule]:
    """All tensors of the release: 26 a block and 12 + `text_layers` outside; 1,264 for the released size."""
    width, hidden = config.width, config.hidden
    result = []

    def dense(name: str, path: str, inputs: int, outputs: int, index=(), bias=True):
        result.append(
            Rule(f"{name}.weight", (outputs, inputs), f"{path}/kernel", index, table.linear, table.linear_back)
        )
        if bias:
            result.append(Rule(f"{name}.bias", (outputs,), f"{path}/bias", index))

    dense("time_text_embed.timestep_embedder.linear_1", "time_in", 256, width)
    dense("time_text_embed.timestep_embedder.linear_2", "time_out", width, width)
    result.extend(
        Rule(f"txt_norm.{i}.weight", (config.text_width,), "text_norm/scale", (i,)) for i in range(config.text_layers)
    )
    dense("txt_in", "text_in", config.text_layers * config.text_width, width)
    dense("img_in", "image_in", config.latent_channels, width)
    for i in range(config.layers):
        for ours, (modulation, norm, qkv, (norm_q, norm_k), out, mlp) in _STREAMS.items():
            block, path = f"transformer_blocks.{i}", f"blocks/{ours}"
            dense(f"{block}.{modulation}", f"{path}/modulation", width, 6 * width, (i,))
            result.append(Rule(f"{block}.{norm}1.weight", (width,), f"{path}/norm1/scale", (i,)))
            result.append(Rule(f"{block}.{norm}2.weight", (width,), f"{path}/norm2/scale", (i,)))
            dense(f"{block}.{qkv}", f"{path}/qkv", width, 3 * width, (i,))
            result.append(Rule(f"{block}.{norm_q}.weight", (config.head_dim,), f"{path}/norm_q/scale", (i,)))
            result.append(Rule(f"{block}.{norm_k}.weight", (config.head_dim,), f"{path}/norm_k/scale", (i,)))
            dense(f"{block}.{out}", f"{path}/out", width, width, (i,))
            # w2(silu(w1 x) * w3 x): w1 is the gate, w3 the other factor.
            for k, w in enumerate(("w1", "w3")):
                dense(f"{block}.{mlp}.{w}", f"{path}/gate_up", width, hidden, (i, slice(None), k), bias=False)
            dense(f"{block}.{mlp}.w2", f"{path}/down", hidden, width, (i,), bias=False)
    dense("norm_out.linear", "modulation_out", width, 2 * width)
    dense("proj_out", "image_out", width, config.latent_channels)
    return result


def from_release(config: DenoiserConfig, tensors: Mapping[str, np.ndarray], source: str) -> dict:
    """Our parameter tree from the tensors of the release, in `config.param_dtype`."""
    wanted = rules(config)
    table.check(wanted, {name: tensors[name].shape for name in tensors}, source)
    template = traverse_util.flatten_dict(denoiser.abstract_params(config), sep="/")
    return traverse_util.unflatten_dict(table.to_tree(wanted, tensors, template), sep="/")
