"""EVA-02 classifiers as timm writes them: config.json in the layout of its hub, and the names of model.safetensors.

The transformers library saves timm models with the same tensors and with most of the same keys (`timm_wrapper`).
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import traverse_util

from lens_jax.convert import prefixes, table
from lens_jax.convert.folder import check_size, read_json
from lens_jax.convert.table import Rule, Tensors
from lens_jax.errors import LensError
from lens_jax.models import eva
from lens_jax.models.eva import EvaConfig

ARCHITECTURE = "eva02_base_patch14_448"
# What transformers puts in front of every name, where it does not take it off again.
_WRAPPER = "timm_model."
_MAX_LAYERS = 64
# Beyond it a single image would take more memory than a device has.
_MAX_IMAGE = 4096
# By the name in timm's `model_args`, in which a config says how it differs from the architecture; of squares it may
# have both sides.
_SIZES = {
    "img_size": "image", "patch_size": "patch", "embed_dim": "width", "depth": "layers", "num_heads": "heads",
    "ref_feat_shape": "rope_grid",
}  # fmt: skip
_SQUARES = ("img_size", "patch_size", "ref_feat_shape")
_FIXED = {
    "in_chans": 3, "class_token": True, "global_pool": "avg", "qkv_bias": True, "qkv_fused": False, "swiglu_mlp": True,
    "scale_mlp": True, "use_abs_pos_emb": True, "use_rot_pos_emb": True, "dynamic_img_size": False,
}  # fmt: skip


def config_from_release(values: Mapping, where: str, **overrides) -> EvaConfig:
    """Our config for a config.json of timm's hub; `overrides` set compute options.

    Raises LensError for a key that is missing or a value that this model cannot have.
    """
    if values.get("architecture") != ARCHITECTURE:
        raise LensError(f"{where}: architecture is {values.get('architecture')!r:.80}; accepted: {ARCHITECTURE}")
    if values.get("global_pool", "avg") != "avg":
        raise LensError(f"{where}: global_pool is {values['global_pool']!r:.80}; accepted: avg")
    pretrained, given = (values.get(key) or {} for key in ("pretrained_cfg", "model_args"))
    for key, part in (("pretrained_cfg", pretrained), ("model_args", given)):
        if not isinstance(part, dict):
            raise LensError(f"{where}: {key} is {part!r:.80}; accepted: an object")
    sizes = {"classes": check_size(values.get("num_classes", pretrained.get("num_classes")), "num_classes", where)}
    ratio = 4 * 2 / 3
    for key, value in given.items():
        name = f"model_args.{key}"
        if key in _SIZES:
            if key in _SQUARES and isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
                value = value[0]
            sizes[_SIZES[key]] = check_size(value, name, where, _MAX_LAYERS if key == "depth" else _MAX_IMAGE)
        elif key == "mlp_ratio":
            if type(value) not in (int, float) or not 0 < value <= 64:
                raise LensError(f"{where}: {name} is {value!r:.80}; accepted: a number above 0, of at most 64")
            ratio = value
        elif key == "num_classes":
            if value != sizes["classes"]:
                raise LensError(f"{where}: {name} is {value!r:.80}, but num_classes is {sizes['classes']}")
        elif key not in _FIXED or value != _FIXED[key]:
            accepted = repr(_FIXED[key]) if key in _FIXED else f"{', '.join((*_SIZES, *_FIXED))}, mlp_ratio"
            raise LensError(f"{where}: {table.shown(name)} is {value!r:.80}; accepted: {accepted}")
    sizes["hidden"] = math.floor(sizes.get("width", EvaConfig.width) * ratio)
    try:
        config = EvaConfig(**sizes, **overrides)
    except LensError as error:
        raise LensError(f"{where}: {error}") from None
    if (size := pretrained.get("input_size", [3, config.image, config.image])) != [3, config.image, config.image]:
        raise LensError(
            f"{where}: pretrained_cfg.input_size is {size!r:.80}; accepted: {[3, config.image, config.image]}"
        )
    return config


def read_config(path: Path, **overrides) -> EvaConfig:
    """`config_from_release` for a file."""
    return config_from_release(read_json(path), str(path), **overrides)


def rules(config: EvaConfig) -> list[Rule]:
    """All tensors: 236 for the released size, in the order of the PyTorch module."""
    c, every = config, slice(None)
    result: list[Rule] = []

    def weight(name: str, path: str, inputs: int, outputs: int, index: tuple = ()):
        shape = (outputs, inputs)
        result.append(Rule(f"{name}.weight", shape, f"{path}/kernel", index, table.linear, table.linear_back))

    def bias(name: str, path: str, size: int, index: tuple = ()):
        result.append(Rule(f"{name}.bias", (size,), f"{path}/bias", index))

    def dense(name: str, path: str, inputs: int, outputs: int, index: tuple = ()):
        weight(name, path, inputs, outputs, index)
        bias(name, path, outputs, index)

    def norm(name: str, path: str, size: int, index: tuple = ()):
        result.append(Rule(f"{name}.weight", (size,), f"{path}/scale", index))
        bias(name, path, size, index)

    result.append(Rule("cls_token", (1, 1, c.width), "class_token"))
    result.append(Rule("pos_embed", (1, c.tokens, c.width), "positions"))
    patch = (c.width, 3, c.patch, c.patch)
    result.append(Rule("patch_embed.proj.weight", patch, "patch/kernel", (), _patch, _patch_back))
    bias("patch_embed.proj", "patch", c.width)
    for i in range(c.layers):
        name = f"blocks.{i}"
        norm(f"{name}.norm1", "blocks/attention_norm", c.width, (i,))
        for part, letter in enumerate("qkv"):
            weight(f"{name}.attn.{letter}_proj", "blocks/qkv", c.width, c.width, (i, every, part))
            if letter != "k":
                bias(f"{name}.attn.{letter}_proj", f"blocks/{letter}", c.width, (i,))
        dense(f"{name}.attn.proj", "blocks/out", c.width, c.width, (i,))
        norm(f"{name}.norm2", "blocks/mlp_norm", c.width, (i,))
        for part, letter in enumerate("gx"):
            weight(f"{name}.mlp.fc1_{letter}", "blocks/gate_up", c.width, c.hidden, (i, every, part))
            bias(f"{name}.mlp.fc1_{letter}", "blocks/gate_up", c.hidden, (i, part))
        norm(f"{name}.mlp.norm", "blocks/hidden_norm", c.hidden, (i,))
        dense(f"{name}.mlp.fc2", "blocks/down", c.hidden, c.width, (i,))
    norm("fc_norm", "norm", c.width)
    dense("head", "head", c.width, c.classes)
    return result


def template(config: EvaConfig) -> dict:
    """Our leaves by path, as shapes and dtypes."""
    return traverse_util.flatten_dict(eva.abstract_params(config), sep="/")


def read(config: EvaConfig, tensors: Tensors, source: str) -> Tensors:
    """The tensors of a file by timm's names, with transformers' prefix or without; float32, bfloat16 or float16.

    Raises LensError that lists every tensor that is missing, unknown or misshapen, and reads none. To read one that has
    a number which is not finite in `config.dtype` is a LensError.
    """
    if all(name.startswith(_WRAPPER) for name in tensors):
        tensors = prefixes.renamed(tensors, {name: name.removeprefix(_WRAPPER) for name in tensors})
    table.check(rules(config), tensors.specs, source)

    def finite(name: str) -> np.ndarray:
        # As it will be used: what float32 holds may be beyond what bfloat16 rounds to a number.
        with np.errstate(all="ignore"):
            array = tensors[name].astype(config.dtype, copy=False)
        if not np.isfinite(array).all():
            raise LensError(f"{source}: {name} has numbers that are not finite in {config.dtype}")
        return array

    return Tensors(tensors.specs, finite)


def leaves(config: EvaConfig, tensors: Tensors, source: str) -> Tensors:
    """Our leaves by path in `config.dtype`, made one at a time; accepts and refuses what `read` does."""
    return table.leaves(rules(config), read(config, tensors, source), template(config))


def _patch(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """PyTorch keeps the convolution as [out, in, height, width]; ours is a product of (height width in)."""
    return array.transpose(2, 3, 1, 0).reshape(shape)


def _patch_back(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    outputs, inputs, height, width = shape
    return array.reshape(height, width, inputs, outputs).transpose(3, 2, 0, 1)
