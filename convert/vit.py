"""Vision transformers as transformers saves them: CLIP's and SigLIP's image towers, and SigLIP's image classifier.

A folder is what the hub has of a repository: config.json and model.safetensors. The weights of the text tower, and of a
pooling head that a classifier carries and does not use, may be there and are not read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from lens_jax.convert import table
from lens_jax.convert.folder import check_size, open_component, read_size
from lens_jax.convert.source import check_exists
from lens_jax.convert.table import Rule, Tensors
from lens_jax.errors import LensError
from lens_jax.models import vit
from lens_jax.models.vit import Pool, VitConfig

WEIGHTS = "model.safetensors"
_MAX_LAYERS = 256
_MAX_WIDTH = 1 << 16
_MAX_IMAGE = 1 << 13
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# What transformers takes where a config.json leaves a key out; `projection_dim` is CLIP's alone.
_CLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 512, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}  # fmt: skip
_SIGLIP = _CLIP | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
# By what becomes of the tokens: the `model_type` of the whole and of an image tower alone, and what is assumed.
_FAMILIES: dict[Pool, tuple[str, str, dict[str, Any]]] = {
    "class": ("clip", "clip_vision_model", _CLIP),
    "attention": ("siglip", "siglip_vision_model", _SIGLIP),
    "mean": ("siglip", "siglip_vision_model", _SIGLIP),
}
# Beginnings of names of what is not read: the text tower and what compares both, positions that are counted.
_UNREAD = {
    "class": ("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids"),
    "attention": ("text_model.", "logit_scale", "logit_bias", "vision_model.embeddings.position_ids"),
    "mean": ("vision_model.head.", "vision_model.embeddings.position_ids"),
}


def config_from_release(values: Mapping[str, Any], where: str, pool: Pool, **overrides) -> VitConfig:
    """Our config for a config.json of transformers' CLIP (`pool` class) or SigLIP (attention, or mean of a classifier).

    `overrides` set compute options. Raises LensError for another kind of model, or a value that this one cannot have.
    """
    whole, alone, defaults = _FAMILIES[pool]
    kind = values.get("model_type")
    if kind not in (whole, alone):
        raise LensError(f"{where}: model_type is {kind!r:.80}; accepted: {whole!r}, {alone!r}")
    tower = values.get("vision_config", {}) if kind == whole else values
    if not isinstance(tower, Mapping) or tower.get("model_type", alone) not in (alone, whole):
        raise LensError(f"{where}: vision_config is {tower!r:.80}; accepted: an object of model_type {alone!r}")
    tower = defaults | {key: tower[key] for key in defaults if key in tower}
    if pool == "class" and kind == whole:
        # Above the projection of both towers; the tower's own is of a model without text.
        tower["projection_dim"] = values.get("projection_dim", defaults["projection_dim"])
    activation, eps = tower["hidden_act"], tower["layer_norm_eps"]
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise LensError(f"{where}: hidden_act is {activation!r:.80}; accepted: {', '.join(_ACTIVATIONS)}")
    if type(eps) is not float or not 0 < eps < 1:
        raise LensError(f"{where}: layer_norm_eps is {eps!r:.80}; accepted: a number between 0 and 1")
    if tower["num_channels"] != 3:
        raise LensError(f"{where}: num_channels is {tower['num_channels']!r:.80}; accepted: 3")
    if pool == "attention" and values.get("vision_use_head", tower.get("vision_use_head", True)) is not True:
        raise LensError(f"{where}: vision_use_head is not true; accepted: a tower with its pooling head")
    size = lambda key, limit: read_size(tower, key, where, limit)
    outputs = {
        "class": lambda: size("projection_dim", _MAX_WIDTH),
        "attention": lambda: 0,
        "mean": lambda: len(labels(values, where)),
    }
    try:
        return VitConfig(
            image=size("image_size", _MAX_IMAGE),
            patch=size("patch_size", _MAX_IMAGE),
            width=size("hidden_size", _MAX_WIDTH),
            layers=size("num_hidden_layers", _MAX_LAYERS),
            heads=size("num_attention_heads", _MAX_WIDTH),
            hidden=size("intermediate_size", 4 * _MAX_WIDTH),
            activation=_ACTIVATIONS[activation],
            pool=pool,
            outputs=outputs[pool](),
            norm_eps=eps,
            **overrides,
        )
    except LensError as error:
        raise error if where in str(error) else LensError(f"{where}: {error}") from None


def labels(values: Mapping[str, Any], where: str) -> list[str]:
    """The names of a classifier's classes, in their order; two without a name where config.json has none."""
    names = values.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
        raise LensError(f"{where}: id2label is {names!r:.80}; accepted: names by the number of the class")
    check_size(len(names), "the number of id2label", where, 1 << 12)
    if set(names) != {str(number) for number in range(len(names))}:
        raise LensError(f"{where}: id2label numbers its {len(names)} classes otherwise than from 0 on")
    return [names[str(number)] for number in range(len(names))]


def rules(config: VitConfig) -> list[Rule]:
    """All tensors of the tower and of its head, by their names in transformers."""
    c, tower = config, "vision_model"
    result: list[Rule] = []

    def norm(name: str, path: str, index=()):
        result.append(Rule(f"{name}.weight", (c.width,), f"{path}/scale", index))
        result.append(Rule(f"{name}.bias", (c.width,), f"{path}/bias", index))

    def dense(name: str, path: str, inputs: int, outputs: int, index=(), part=(), bias: bool = True):
        kernel = (*index, slice(None), *part) if part else index
        linear = {"forward": table.linear, "backward": table.linear_back}
        result.append(Rule(f"{name}weight", (outputs, inputs), f"{path}/kernel", kernel, **linear))
        if bias:
            result.append(Rule(f"{name}bias", (outputs,), f"{path}/bias", (*index, *part)))

    def mlp(name: str, path: str, index=()):
        dense(f"{name}.fc1.", f"{path}/up", c.width, c.hidden, index)
        dense(f"{name}.fc2.", f"{path}/down", c.hidden, c.width, index)

    embeddings = f"{tower}.embeddings"
    square = (c.width, 3, c.patch, c.patch)
    result.append(Rule(f"{embeddings}.patch_embedding.weight", square, "patch/kernel", (), _patch, _patch_back))
    result.append(Rule(f"{embeddings}.position_embedding.weight", (c.tokens, c.width), "positions"))
    if c.pool == "class":
        result.append(Rule(f"{embeddings}.class_embedding", (c.width,), "class_token"))
        norm(f"{tower}.pre_layrnorm", "norm_in")  # spelt so
        dense("visual_projection.", "head", c.width, c.outputs, bias=False)
    else:
        result.append(Rule(f"{embeddings}.patch_embedding.bias", (c.width,), "patch/bias"))
    for i in range(c.layers):
        name, index = f"{tower}.encoder.layers.{i}", (i,)
        norm(f"{name}.layer_norm1", "blocks/attention_norm", index)
        for part, letter in enumerate("qkv"):
            dense(f"{name}.self_attn.{letter}_proj.", "blocks/qkv", c.width, c.width, index, (part,))
        dense(f"{name}.self_attn.out_proj.", "blocks/out", c.width, c.width, index)
        norm(f"{name}.layer_norm2", "blocks/mlp_norm", index)
        mlp(f"{name}.mlp", "blocks", index)
    norm(f"{tower}.post_layernorm", "norm")
    if c.pool == "mean":
        dense("classifier.", "head", c.width, c.outputs)
    if c.pool == "attention":
        head = f"{tower}.head"
        result.append(Rule(f"{head}.probe", (1, 1, c.width), "pool/query"))
        # PyTorch keeps the three projections of a MultiheadAttention as one.
        dense(f"{head}.attention.in_proj_", "pool/qkv", c.width, 3 * c.width)
        dense(f"{head}.attention.out_proj.", "pool/out", c.width, c.width)
        norm(f"{head}.layernorm", "pool/mlp_norm")
        mlp(f"{head}.mlp", "pool")
    return result


def template(config: VitConfig) -> dict[str, Any]:
    """Our leaves by path, as shapes and dtypes."""
    return traverse_util.flatten_dict(vit.abstract_params(config), sep="/")


def leaves(config: VitConfig, tensors: Tensors, source: str) -> Tensors:
    """Our leaves by path, each made when it is read and not kept.

    Raises LensError that lists what is missing, unknown or misshapen, before any leaf is made; and where a leaf is read
    that has a number which is none.
    """
    unread = _UNREAD[config.pool]
    read = {name: spec for name, spec in tensors.specs.items() if not name.startswith(unread)}
    table.check(rules(config), read, source)
    return table.leaves(rules(config), table.finite(tensors, source), template(config))


def open_weights(folder: Path) -> Tensors:
    """The tensors of a release folder by name: of its model.safetensors, whatever else is there, or of its shards."""
    check_exists(folder)
    if not folder.is_dir():
        raise LensError(f"{folder}: not a folder; accepted: one with config.json and {WEIGHTS}")
    single = folder / WEIGHTS
    return open_component(single if single.exists() else folder)


def _patch(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """PyTorch keeps the convolution as [out, channels, rows, columns]; ours is [(rows columns channels), out]."""
    return array.transpose(2, 3, 1, 0).reshape(shape)


def _patch_back(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    outputs, channels, rows, columns = shape
    return array.reshape(rows, columns, channels, outputs).transpose(3, 2, 0, 1)
