"""The autoencoder of the release: `vae/`, class AutoencoderKLFlux2 (2.2), and the LDM names of 6.1."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import traverse_util

from lens_jax.convert import prefixes, quantized, table
from lens_jax.convert.folder import check_size, read_json, read_size
from lens_jax.convert.table import Rule, Spec, Tensors
from lens_jax.errors import LensError
from lens_jax.models import autoencoder
from lens_jax.models.autoencoder import AutoencoderConfig

_MAX_LAYERS = 64
_MAX_LEVELS = 8
_F32, _I64 = np.dtype(np.float32), np.dtype(np.int64)


def config_from_release(values: Mapping, where: str, **overrides) -> AutoencoderConfig:
    """Our config for a `vae/config.json` of the release (1.5); `overrides` set compute options.

    Raises LensError for a key that is missing or a value that this model cannot have.
    """
    widths = values.get("block_out_channels")
    if not isinstance(widths, list) or not 1 <= len(widths) <= _MAX_LEVELS:
        raise LensError(f"{where}: block_out_channels is {widths!r:.80}; accepted: 1 to {_MAX_LEVELS} sizes")
    widths = tuple(check_size(width, "block_out_channels", where) for width in widths)
    fixed = {
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    for key, accepted in fixed.items():
        if key not in values or values[key] != accepted:
            raise LensError(f"{where}: {key} is {values.get(key)!r:.80}; accepted: {accepted}")
    if values.get("decoder_block_out_channels") not in (None, list(widths)):
        raise LensError(f"{where}: decoder_block_out_channels differs from block_out_channels; accepted: null")
    patch, eps = values.get("patch_size"), values.get("batch_norm_eps", 1e-4)
    if not isinstance(patch, list) or len(patch) != 2 or patch[0] != patch[1]:
        raise LensError(f"{where}: patch_size is {patch!r:.80}; accepted: two equal sizes")
    if type(eps) is not float or not 0 < eps < 1:
        raise LensError(f"{where}: batch_norm_eps is {eps!r:.80}; accepted: a number between 0 and 1")
    return AutoencoderConfig(
        widths=widths,
        layers=read_size(values, "layers_per_block", where, _MAX_LAYERS),
        cell_channels=read_size(values, "latent_channels", where),
        patch=check_size(patch[0], "patch_size", where, 16),
        groups=read_size(values, "norm_num_groups", where),
        latent_eps=eps,
        **overrides,
    )


def read_config(path: Path, **overrides) -> AutoencoderConfig:
    """`config_from_release` for a file."""
    return config_from_release(read_json(path), str(path), **overrides)


def config_to_release(config: AutoencoderConfig) -> dict:
    """A `vae/config.json` of the release."""
    return {
        "_class_name": "AutoencoderKLFlux2",
        "_diffusers_version": "0.37.1",
        "act_fn": "silu",
        "batch_norm_eps": config.latent_eps,
        "batch_norm_momentum": 0.1,
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(config.widths),
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": config.cell_channels,
        "layers_per_block": config.layers,
        "mid_block_add_attention": True,
        "norm_num_groups": config.groups,
        "out_channels": 3,
        "patch_size": [config.patch, config.patch],
        "sample_size": 1024,
        "up_block_types": ["UpDecoderBlock2D"] * len(config.widths),
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    }


class _Names:
    """The names one scheme gives to the parts of the model."""

    def __init__(self, ldm: bool, levels: int):
        self.ldm = ldm
        self.quant = "encoder.quant_conv" if ldm else "quant_conv"
        self.post_quant = "decoder.post_quant_conv" if ldm else "post_quant_conv"
        self.norm_out = "norm_out" if ldm else "conv_norm_out"
        self.shortcut = "nin_shortcut" if ldm else "conv_shortcut"
        self.attention = "mid.attn_1" if ldm else "mid_block.attentions.0"
        self.attention_parts = ("norm", "q", "k", "v", "proj_out") if ldm else _DIFFUSERS_ATTENTION
        self.levels = levels

    def level(self, half: str, i: int) -> str:
        # LDM counts the levels of the decoder from the finest, although they run from the coarsest.
        if self.ldm:
            return f"encoder.down.{i}" if half == "encoder" else f"decoder.up.{self.levels - 1 - i}"
        return f"encoder.down_blocks.{i}" if half == "encoder" else f"decoder.up_blocks.{i}"

    def resnet(self, j: int) -> str:
        return f"block.{j}" if self.ldm else f"resnets.{j}"

    def middle(self, j: int) -> str:
        return f"mid.block_{j + 1}" if self.ldm else f"mid_block.resnets.{j}"

    def resample(self, half: str) -> str:
        if self.ldm:
            return "downsample.conv" if half == "encoder" else "upsample.conv"
        return "downsamplers.0.conv" if half == "encoder" else "upsamplers.0.conv"


_DIFFUSERS_ATTENTION = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")


def rules(config: AutoencoderConfig, ldm: bool = False) -> list[Rule]:
    """All tensors: 251 for the released size, in the order of the PyTorch module.

    With `ldm` their LDM names and shapes, in the same order.
    """
    names = _Names(ldm, len(config.widths))
    result: list[Rule] = []

    def conv(name: str, path: str, inputs: int, outputs: int, side: int = 3):
        shape = (outputs, inputs, side, side)
        result.append(Rule(f"{name}.weight", shape, f"{path}/kernel", (), _conv, _conv_back))
        result.append(Rule(f"{name}.bias", (outputs,), f"{path}/bias"))

    def norm(name: str, path: str, size: int):
        result.append(Rule(f"{name}.weight", (size,), f"{path}/scale"))
        result.append(Rule(f"{name}.bias", (size,), f"{path}/bias"))

    def dense(name: str, path: str, size: int):
        # LDM has 1 x 1 convolutions here.
        shape = (size, size, 1, 1) if ldm else (size, size)
        result.append(Rule(f"{name}.weight", shape, f"{path}/kernel", (), table.linear, table.linear_back))
        result.append(Rule(f"{name}.bias", (size,), f"{path}/bias"))

    def resnet(name: str, path: str, inputs: int, outputs: int):
        norm(f"{name}.norm1", f"{path}/norm1", inputs)
        conv(f"{name}.conv1", f"{path}/conv1", inputs, outputs)
        norm(f"{name}.norm2", f"{path}/norm2", outputs)
        conv(f"{name}.conv2", f"{path}/conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.{names.shortcut}", f"{path}/shortcut", inputs, outputs, side=1)

    def middle(half: str, size: int):
        parts = zip(names.attention_parts, ("norm", "q", "k", "v", "out"))
        for theirs, ours in parts:
            add = norm if ours == "norm" else dense
            add(f"{half}.{names.attention}.{theirs}", f"{half}/middle/attention/{ours}", size)
        for j in range(2):
            resnet(f"{half}.{names.middle(j)}", f"{half}/middle/resnets/{j}", size, size)

    def level(half: str, i: int, inputs: int, size: int, layers: int):
        name, path = names.level(half, i), f"{half}/levels/{i}"
        for j in range(layers):
            resnet(f"{name}.{names.resnet(j)}", f"{path}/resnets/{j}", size if j else inputs, size)
        if i < len(config.widths) - 1:
            way = "down" if half == "encoder" else "up"
            conv(f"{name}.{names.resample(half)}", f"{path}/{way}", size, size)

    widths, cells = config.widths, config.cell_channels
    conv("encoder.conv_in", "encoder/conv_in", 3, widths[0])
    for i, size in enumerate(widths):
        level("encoder", i, widths[max(i - 1, 0)], size, config.layers)
    middle("encoder", widths[-1])
    norm(f"encoder.{names.norm_out}", "encoder/norm_out", widths[-1])
    conv("encoder.conv_out", "encoder/conv_out", widths[-1], 2 * cells)
    widths = widths[::-1]
    conv("decoder.conv_in", "decoder/conv_in", cells, widths[0])
    middle("decoder", widths[0])
    for i, size in enumerate(widths):
        level("decoder", i, widths[max(i - 1, 0)], size, config.layers + 1)
    norm(f"decoder.{names.norm_out}", "decoder/norm_out", widths[-1])
    conv("decoder.conv_out", "decoder/conv_out", widths[-1], 3)
    conv(names.quant, "encoder/quant", 2 * cells, 2 * cells, side=1)
    conv(names.post_quant, "decoder/post_quant", cells, cells, side=1)
    for theirs, ours in (("running_mean", "mean"), ("running_var", "variance")):
        result.append(Rule(f"bn.{theirs}", (config.latent_channels,), f"latent_statistics/{ours}", written=_F32))
    # LDM files and some mirrors do without; it counts batches of a training long past.
    result.append(
        Rule(
            "bn.num_batches_tracked",
            (),
            "latent_statistics/batches",
            forward=_count,
            dtypes=(_I64,),
            written=_I64,
            required=False,
        )
    )
    return result


def template(config: AutoencoderConfig) -> dict:
    """Our leaves by path, as shapes and dtypes."""
    return traverse_util.flatten_dict(autoencoder.abstract_params(config), sep="/")


def read(config: AutoencoderConfig, tensors: Mapping[str, np.ndarray], source: str) -> Tensors:
    """The tensors of the release by name, made when they are read; accepts what `from_release` accepts."""
    schemes = [rules(config, ldm) for ldm in (False, True)]
    bare = [prefixes.strip(tensors, [rule.name for rule in scheme], source) for scheme in schemes]
    fits = [sum(rule.name in t for rule in scheme) for scheme, t in zip(schemes, bare)]
    best = int(fits[1] > fits[0])
    found = _laid_out(schemes[best], bare[best], source)
    table.check(schemes[best], found.specs, source)
    # The same weights in both: where the shapes differ it is by axes of size 1.
    pairs = {rule.name: (rule, old.name) for rule, old in zip(schemes[0], schemes[best]) if old.name in found}
    specs = {name: Spec(found.dtype(old), rule.shape) for name, (rule, old) in pairs.items()}
    return Tensors(specs, lambda name: found[pairs[name][1]].reshape(specs[name].shape))


def _laid_out(scheme: list[Rule], bare: Tensors, source: str) -> Tensors:
    """The tensors as one scheme names and lays them out: MLX keeps a convolution as [out, height, width, in]."""
    # LDM has these two within the halves, or beside them.
    outer = {f"{half}.{name}.{end}": f"{name}.{end}" for half, name in _QUANT for end in ("weight", "bias")}
    both = {**outer, **{new: old for old, new in outer.items()}}
    names = {both[r.name]: r.name for r in scheme if r.name in both and r.name not in bare and both[r.name] in bare}
    found = prefixes.renamed(quantized.dequantize(bare, source), names)
    last = lambda shape: (shape[0], *shape[2:], shape[1])
    shapes = {r.name: (found.shape(r.name), r.shape) for r in scheme if len(r.shape) == 4 and r.name in found}
    # Of some, 3 x 3 with 3 inputs, the shape does not tell; all are alike.
    moved = any(have != want and have == last(want) for have, want in shapes.values())
    moved = {name for name, (have, want) in shapes.items() if moved and have == last(want)}
    square = {r.name: r.shape for r in scheme if r.name in found and _same_but_ones(found.shape(r.name), r.shape)}
    specs = {name: Spec(spec.dtype, square.get(name, spec.shape)) for name, spec in found.specs.items()}
    specs.update({name: Spec(found.dtype(name), shapes[name][1]) for name in moved})
    read = lambda name: np.moveaxis(found[name], -1, 1) if name in moved else found[name].reshape(specs[name].shape)
    return Tensors(specs, read)


_QUANT = (("encoder", "quant_conv"), ("decoder", "post_quant_conv"))


def _same_but_ones(have: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Whether one of two shapes of a matrix is that of a 1 x 1 convolution."""
    ones = lambda shape: tuple(size for size in shape if size != 1)
    return have != want and {len(have), len(want)} <= {2, 4} and ones(have) == ones(want) and len(ones(have)) == 2


def leaves(config: AutoencoderConfig, tensors: Mapping[str, np.ndarray], source: str) -> Tensors:
    """Our leaves by path in `config.param_dtype`, made one at a time.

    Accepts what `from_release` accepts, and checks it before the first leaf is made.
    """
    return table.leaves(rules(config), read(config, tensors, source), template(config))


def from_release(config: AutoencoderConfig, tensors: Mapping[str, np.ndarray], source: str) -> dict:
    """Our parameter tree in `config.param_dtype` (statistics in float32), as numpy arrays.

    Args:
      tensors: named as in diffusers or as in LDM, with a prefix of 6.1 or without; float32, bfloat16 or float16.
      source: the file or folder, for messages.

    Raises LensError that lists every tensor that is missing, unknown or misshapen.
    """
    return traverse_util.unflatten_dict(dict(leaves(config, tensors, source)), sep="/")


def to_release(config: AutoencoderConfig, params: Mapping, dtype: np.dtype | None = None) -> Tensors:
    """The tensors of the release from our tree, made one at a time, in `dtype` or that of the tree.

    The statistics stay float32 and the count of batches an int64, as in the release.
    """
    return table.to_release(rules(config), traverse_util.flatten_dict(params, sep="/"), dtype)


def _conv(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """PyTorch keeps a convolution as [out, in, height, width]; ours is [height, width, in, out]."""
    return array.transpose(2, 3, 1, 0).reshape(shape)


def _conv_back(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array.transpose(3, 2, 0, 1).reshape(shape)


def _count(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An int64 that JAX can hold without its 64-bit mode."""
    if not 0 <= array < 2**31:
        raise LensError(f"bn.num_batches_tracked is {array}; accepted: 0 to 2³¹ - 1")
    return array.reshape(shape)
