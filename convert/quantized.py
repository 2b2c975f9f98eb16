"""Quantised layouts of other programs, turned back into plain tensors (release 6.1, 6.3).

What a tensor is, is what its file says of it (ComfyUI's `comfy_quant`), never a guess from dtypes: the same bytes are
other numbers in another order. A layer X is X.weight with, as its kind wants them, X.weight_scale, X.weight_scale_2 and
what says the kind. Everything comes out as float32, which holds MXFP8 and MXFP4 exactly, and the products of others as
well as their own program computes them.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lens_jax.convert.gguf import BLOCKS, SCALES
from lens_jax.convert.quantized_numbers import affine, mxfp4, mxfp8, nvfp4, unrotate
from lens_jax.convert.table import FLOATS, Spec, Tensors, shown, specs_of
from lens_jax.errors import LensError

_E4M3, _E5M2, _E8M0 = (np.dtype(d) for d in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu))
_U8, _I8, _U32, _F32 = (np.dtype(d) for d in (np.uint8, np.int8, np.uint32, np.float32))
_FP8 = (_E4M3, _E5M2)

# Storage of each format that `comfy_quant` may name.
FORMATS = {
    "float8_e4m3fn": _E4M3,
    "float8_e4m3fn_rowwise": _E4M3,
    "float8_e4m3fn_blockwise": _E4M3,
    "float8_e5m2": _E5M2,
    "int8_tensorwise": _I8,
    "int8_blockwise": _I8,
    "mxfp8": _E4M3,
    "hybrid_mxfp8": _E4M3,
    "nvfp4": _U8,
}
# What else it may say; anything more could change what the numbers mean.
_KEYS = {"format", "orig_dtype", "orig_shape", "group_size", "full_precision_matrix_mult", "per_row"}
_CONVROT = {"convrot", "convrot_groupsize"}
_MAX_SAID = 4096
# What is read with a weight, or belongs to activations, or to hardware that cannot do better.
_HELPERS = ("weight_scale", "weight_scale_2", "comfy_quant", "input_scale", "weight_scalar", "scales", "biases")
_OLD_NAMES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
_MARKER = "scaled_fp8"

# Ends of names by which other quantisations are known; none of them is read.
_FOREIGN = {
    "SDNQ": (".zero_point", ".svd_up", ".svd_down"),
    "bitsandbytes": (".absmax", ".quant_map", ".SCB", ".quant_state.bitsandbytes__nf4"),
    "GPTQ, AWQ or SVDQuant": (".qweight", ".qzeros", ".wscales"),
    "compressed-tensors": (".weight_packed", ".weight_zero_point"),
    "W4A8 with a codebook": (".weight_codebook", ".weight_s_rel"),
}


def dequantize(tensors: Mapping[str, np.ndarray], source: str) -> Tensors:
    """The same tensors with every quantised `X.weight` as float32, computed when it is read, and without its scales.

    - ComfyUI, where `X.comfy_quant` (or the file's header) says so: the formats of `FORMATS`, experts [E, out, in] too;
      int8 with ConvRot is rotated back.
    - float8: as it is cast where nothing in the file is scaled; with `X.weight_scale` or the older `X.scale_weight`.
    - MLX: `X.weight` uint32 with `X.scales` and `X.biases`, groups of 64, 4 or 8 bits; MXFP4 without `X.biases`.
    - MXFP4 out of a GGUF file: `X.blocks` uint8 [..., in / 32, 16], `X.scales` uint8 [..., in / 32].

    Raises LensError when weights and scales do not fit each other, or when a quantisation is another one, by its name.
    """
    old = {_new_name(name): name for name in specs_of(tensors)}
    specs = {name: specs_of(tensors)[before] for name, before in old.items()}
    get = lambda name: tensors[old[name]]
    _refuse_foreign(specs, source)
    result, readers = {}, {}
    for name, spec in specs.items():
        base, _, last = name.rpartition(".")
        packed = name.removesuffix(BLOCKS)
        if packed != name and packed + SCALES in specs:
            result[packed] = Spec(_F32, (*spec.shape[:-2], 32 * spec.shape[-2]))
            readers[packed] = functools.partial(_gguf, get, packed)
        elif last == _MARKER or _goes_with_another(name, base, last, specs):
            continue
        elif last == "weight" and (layer := _layer(base, specs, get, source)):
            result[name], readers[name] = layer
        else:
            result[name] = spec
    _check_plain(result, readers, any(name.rpartition(".")[2] == _MARKER for name in specs), source)
    for name, spec in list(result.items()):
        if name not in readers and spec.dtype in _FP8:
            result[name], readers[name] = Spec(_F32, spec.shape), functools.partial(_cast, get, name)
    return Tensors(result, lambda name: readers[name]() if name in readers else get(name))


def _goes_with_another(name: str, base: str, last: str, specs: Mapping[str, Spec]) -> bool:
    if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in specs:
        return True
    return last in _HELPERS and f"{base}.weight" in specs


def _new_name(name: str) -> str:
    base, _, last = name.rpartition(".")
    return f"{base}.{_OLD_NAMES[last]}" if last in _OLD_NAMES else name


def _refuse_foreign(specs: Mapping[str, Spec], source: str) -> None:
    for name, spec in specs.items():
        kinds = [kind for kind, ends in _FOREIGN.items() if name.endswith(ends)]
        beside = specs.get(f"{name[:-6]}.weight") if name.endswith(".scale") else None
        if beside and spec.shape and beside.dtype in (_U8, _I8):
            kinds = ["SDNQ"]
        if kinds:
            raise LensError(
                f"{source}: is quantised by {kinds[0]} ({shown(name)}), which is not read here; take the float32, "
                "bfloat16, fp8, MXFP8, NVFP4, int8, MLX or GGUF weights"
            )


def _check_plain(specs: Mapping[str, Spec], readers: Mapping, marked: bool, source: str) -> None:
    """What is left must be numbers as they are: float8 only where none in the file is scaled."""
    scaled = marked or any(name.endswith(".weight") for name in readers)
    for name, spec in specs.items():
        bare = spec.dtype in (_I8, _U32, _E8M0) or (spec.dtype in _FP8 and scaled)
        if name not in readers and bare and name.endswith(".weight"):
            raise LensError(f"{source}: {shown(name)} is {spec.dtype} without a scale; its weight_scale is missing")


@dataclasses.dataclass(frozen=True)
class _Said:
    """What a file says of a layer."""

    format: str
    group: int
    shape: tuple[int, ...] | None
    # Inputs that were rotated together; 0 where none were.
    rotated: int


def _layer(base: str, specs: Mapping[str, Spec], get: Callable, source: str):
    """The spec of a layer's plain weight and what reads it; None where it is plain already."""
    weight, where = specs[f"{base}.weight"], f"{source}: {shown(base)}"
    scale, second = specs.get(f"{base}.weight_scale"), specs.get(f"{base}.weight_scale_2")
    if weight.dtype == _U32 and f"{base}.scales" in specs:
        return _mlx(base, specs, get, where)
    if f"{base}.comfy_quant" in specs:
        said = _said(get(f"{base}.comfy_quant"), weight, where)
    elif scale is None:
        return None
    elif weight.dtype in _FP8 and scale.dtype in FLOATS:
        said = _Said(str(weight.dtype), 0, None, 0)
    else:
        raise LensError(
            f"{where} is {weight.dtype} with scales of {scale.dtype}, and nothing says how they are laid out (no "
            "comfy_quant, no _quantization_metadata in the header)"
        )
    if scale is None:
        raise LensError(f"{where}.weight_scale is missing; comfy_quant says {said.format}")
    if (second is not None) != (said.format == "nvfp4"):
        raise LensError(f"{where}: weight_scale_2 belongs to nvfp4 alone; comfy_quant says {said.format}")
    if len(weight.shape) not in (2, 3):
        raise LensError(f"{where}.weight is {list(weight.shape)}; accepted: [out, in] or [experts, out, in]")
    read = lambda name: get(f"{base}.{name}")
    if said.format == "nvfp4":
        shape = (*weight.shape[:-1], 2 * weight.shape[-1])
        _check_blocks(where, scale, shape, 16, (_E4M3,), row_major=False)
        if second.dtype != _F32 or second.shape not in (shape[:-2], (*shape[:-2], 1), (*shape[:-2], 1, 1)):
            raise LensError(
                f"{where}.weight_scale_2 is {second.dtype} {list(second.shape)}, expected {list(shape[:-2])}"
            )
        make = lambda: nvfp4(np.array(read("weight")), np.array(read("weight_scale")), read("weight_scale_2"))
    elif said.format.endswith("mxfp8"):
        shape = weight.shape
        _check_blocks(where, scale, shape, 32, (_U8, _E8M0), row_major=True)
        make = lambda: mxfp8(np.array(read("weight")), read("weight_scale").view(_U8))
    else:
        shape = weight.shape
        view = _view(where, scale, shape, said)
        make = lambda: _scaled(np.array(read("weight")), read("weight_scale"), view, said)
    cut = said.shape or shape
    return Spec(_F32, cut), lambda: make()[tuple(slice(size) for size in cut)]


def _said(raw: np.ndarray, weight: Spec, where: str) -> _Said:
    """What `comfy_quant` says, believed to the letter; LensError for anything that is not known."""
    try:
        if raw.dtype != _U8 or raw.size > _MAX_SAID:
            raise ValueError
        values = json.loads(raw.tobytes())
        kind = values["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise LensError(f"{where}.comfy_quant is not a JSON object with a format") from None
    if not isinstance(kind, str) or kind not in FORMATS:
        raise LensError(f"{where} is quantised as {kind!r:.80}; accepted: {', '.join(FORMATS)}")
    known = _KEYS | (_CONVROT if kind == "int8_tensorwise" else set())
    unknown = [key for key in values if key not in known and values[key] not in (None, False)]
    if unknown:
        raise LensError(f"{where}: comfy_quant says {unknown[0]!r:.80} of {kind}, which is not known here")
    if weight.dtype != FORMATS[kind]:
        raise LensError(f"{where}.weight is {weight.dtype}; comfy_quant says {kind}, which is {FORMATS[kind]}")
    fixed = {"mxfp8": 32, "hybrid_mxfp8": 32, "nvfp4": 16}.get(kind)
    group = values.get("group_size", fixed)
    if (kind.endswith("blockwise") or fixed) and not (_size(group) and group == (fixed or group)):
        raise LensError(f"{where}: group_size is {group!r:.80}; accepted for {kind}: {fixed or 'a size'}")
    rotate = values.get("convrot", False)
    rotated = values.get("convrot_groupsize", 256) if rotate else 0
    power = _size(rotated) and rotated <= 4096 and rotated.bit_count() == 1 and rotated.bit_length() % 2 == 1
    if rotate is not False and not (rotate is True and power and rotated > 1 and weight.shape[-1] % rotated == 0):
        raise LensError(
            f"{where}: convrot {rotate!r:.20} of {rotated!r:.20}; accepted: a power of 4 that divides its inputs"
        )
    return _Said(kind, group or 0, _original(values.get("orig_shape"), weight, kind, where), rotated)


def _original(given: Any, weight: Spec, kind: str, where: str) -> tuple[int, ...] | None:
    """The shape before rows and inputs were padded to whole blocks."""
    if given is None:
        return None
    stored = (*weight.shape[:-1], weight.shape[-1] * (2 if kind == "nvfp4" else 1))
    fits = isinstance(given, list) and len(given) == len(stored) and all(map(_size, given))
    if not fits or not all(0 <= have - size < 128 for size, have in zip(given, stored)):
        raise LensError(f"{where}: orig_shape is {given!r:.80}, but the weight is {list(stored)}")
    return tuple(given)


def _size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 24


def _check_blocks(where: str, scale: Spec, shape: tuple[int, ...], group: int, dtypes, row_major: bool) -> None:
    """Scales of `group` inputs each in the order of cuBLAS; or plain, where their shape shows that."""
    if scale.dtype not in dtypes:
        raise LensError(f"{where}.weight_scale is {scale.dtype}; accepted: {', '.join(map(str, dtypes))}")
    plain = (*shape[:-1], shape[-1] // group)
    padded = (*shape[:-2], -(-plain[-2] // 128) * 128, -(-plain[-1] // 4) * 4)
    if shape[-1] % group or scale.shape not in ((padded, plain) if row_major else (padded,)):
        raise LensError(f"{where}.weight_scale is {list(scale.shape)}, expected {list(padded)} for {list(shape)}")


def _view(where: str, scale: Spec, shape: tuple[int, ...], said: _Said) -> tuple[int, ...]:
    """The shape in which one scale for all, for an expert, a row or a block lies over [..., out, in]."""
    *batch, rows, columns = shape
    if scale.dtype not in FLOATS:
        raise LensError(
            f"{where}.weight_scale is {scale.dtype}; accepted for {said.format}: float32, bfloat16, float16"
        )
    if said.format.endswith("blockwise"):
        views = (
            {} if rows % said.group or columns % said.group else {(*batch, rows // said.group, columns // said.group)}
        )
    else:
        one, row = (*batch, 1, 1), (*batch, rows, 1)
        views = {(*batch, rows): row, row: row}
        if not said.format.endswith("rowwise"):
            views = {(): one, (1,): one, (1, 1): one, tuple(batch): one, (*batch, 1): one, one: one, **views}
        if len(views) and scale.shape in views:
            return (1,) * len(shape) if scale.shape in ((), (1,), (1, 1)) else views[scale.shape]
        views = set()
    if scale.shape in views:
        return scale.shape
    raise LensError(
        f"{where}.weight_scale is {list(scale.shape)} for {list(shape)}; {said.format} needs one, or one a row or block"
    )


def _scaled(weight: np.ndarray, scale: np.ndarray, view: tuple[int, ...], said: _Said) -> np.ndarray:
    factors = np.array(scale).astype(np.float32).reshape(view)
    if said.format.endswith("blockwise"):
        factors = factors.repeat(said.group, -2).repeat(said.group, -1)
    values = weight.astype(np.float32) * factors
    return unrotate(values, said.rotated) if said.rotated else values


def _mlx(base: str, specs: Mapping[str, Spec], get: Callable, where: str):
    weight, scales, biases = (specs.get(f"{base}.{name}") for name in ("weight", "scales", "biases"))
    columns = 64 if biases else 32
    bits = (
        0
        if not weight.shape or not scales.shape or not scales.shape[-1]
        else 32 * weight.shape[-1] / (columns * scales.shape[-1])
    )
    fits = scales.shape[:-1] == weight.shape[:-1] and len(weight.shape) in (2, 3)
    known = (
        scales.dtype in FLOATS and biases == scales and bits in (4, 8) if biases else (scales.dtype, bits) == (_U8, 4)
    )
    if not fits or not known:
        raise LensError(
            f"{where}.weight is uint32 {list(weight.shape)} with scales {scales.dtype} {list(scales.shape)}; accepted "
            "of MLX: groups of 64 with 4 or 8 bits, or MXFP4"
        )
    shape = (*weight.shape[:-1], columns * scales.shape[-1])
    read = lambda name: np.array(get(f"{base}.{name}"))
    if biases:
        return Spec(_F32, shape), lambda: affine(read("weight"), read("scales"), read("biases"), int(bits))

    def packed() -> np.ndarray:
        blocks = read("weight").astype("<u4").view(np.uint8)
        return mxfp4(blocks.reshape(*scales.shape, 16), read("scales"))

    return Spec(_F32, shape), packed


def _gguf(get: Callable, name: str) -> np.ndarray:
    # Copied: reading the second tensor may let go of the first.
    return mxfp4(np.array(get(name + BLOCKS)), get(name + SCALES))


def _cast(get: Callable, name: str) -> np.ndarray:
    return get(name).astype(np.float32)
