"""Quantised layouts of other programs, turned back into plain tensors (release 6.1, 6.3).

MXFP8 and NVFP4 as ComfyUI writes them keep one scale for a few neighbouring inputs, in the "swizzled" order that cuBLAS
reads: tiles of 128 rows by 4 scale columns, and in a tile row r and column c at (r % 32) * 16 + (r // 32) * 4 + c.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from lens_jax.convert.gguf import BLOCKS, SCALES
from lens_jax.convert.table import Spec, Tensors, specs_of
from lens_jax.errors import LensError

# Values of the sixteen codes of E2M1.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

# Values of the bytes of E8M0; 255 is not a number.
_E8M0 = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))

_E4M3, _U8, _F32 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.uint8), np.dtype(np.float32)
_EXTRA = (".weight_scale", ".weight_scale_2", ".comfy_quant")


def dequantize(tensors: Mapping[str, np.ndarray], source: str) -> Tensors:
    """The same tensors with every quantised `X.weight` as float32, computed when it is read, and without its scales.

    MXFP8: `X.weight` e4m3 [out, in], `X.weight_scale` uint8 (E8M0, 32 inputs each).
    NVFP4: `X.weight` uint8 [..., out, in / 2], high nibble first, `X.weight_scale` e4m3 (16 inputs each),
    `X.weight_scale_2` float32 [...].
    MXFP4 out of a GGUF file: `X.blocks` uint8 [..., in / 32, 16], `X.scales` uint8 [..., in / 32].
    Float32 holds a value of MXFP8 or MXFP4 exactly; so does bfloat16.

    Raises LensError when the weights and scales do not fit each other, or are of another kind.
    """
    specs = specs_of(tensors)
    result, readers = {}, {}
    for name, spec in specs.items():
        base = name.removesuffix(".weight")
        packed = name.removesuffix(BLOCKS)
        if packed != name and packed + SCALES in specs:
            result[packed], readers[packed] = Spec(_F32, (*spec.shape[:-2], 32 * spec.shape[-2])), _read_mxfp4
            continue
        if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in specs:
            continue
        if name.endswith(_EXTRA) and name.rsplit(".", 1)[0] + ".weight" in specs:
            continue
        result[name] = spec
        if base != name and f"{base}.weight_scale" in specs:
            result[name], readers[name] = _layer(base, specs, source)

    def read(name: str) -> np.ndarray:
        return readers[name](tensors, name) if name in readers else tensors[name]

    return Tensors(result, read)


def _layer(base: str, specs: Mapping[str, Spec], source: str):
    """The spec of a layer's plain weight, and what reads it."""
    weight, scale = specs[f"{base}.weight"], specs[f"{base}.weight_scale"]
    second = specs.get(f"{base}.weight_scale_2")
    kind = (weight.dtype, scale.dtype)
    if kind == (_E4M3, _U8) and second is None and len(weight.shape) == 2:
        shape, group, read = weight.shape, 32, _read_mxfp8
    elif kind == (_U8, _E4M3) and second is not None and second.dtype == _F32 and len(weight.shape) in (2, 3):
        shape, group, read = (*weight.shape[:-1], 2 * weight.shape[-1]), 16, _read_nvfp4
        if second.shape not in (shape[:-2], (*shape[:-2], 1)):
            raise LensError(f"{source}: {base}.weight_scale_2 is {list(second.shape)}, expected {list(shape[:-2])}")
    else:
        raise LensError(
            f"{source}: {base} is quantised as {weight.dtype} with scales of {scale.dtype}; accepted: "
            "MXFP8 (float8_e4m3fn with uint8) and NVFP4 (uint8 with float8_e4m3fn and a float32 weight_scale_2)"
        )
    padded = (*shape[:-2], -(-shape[-2] // 128) * 128, -(-(shape[-1] // group) // 4) * 4)
    if shape[-1] % group or scale.shape != padded:
        raise LensError(
            f"{source}: {base}.weight_scale is {list(scale.shape)}, expected {list(padded)} for {list(shape)}"
        )
    return Spec(_F32, shape), read


def unswizzle(scales: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Scales [..., 128 x, 4 y] in the order of cuBLAS -> [..., rows, columns], the padding cut off."""
    *batch, padded_rows, padded_columns = scales.shape
    tiles = scales.reshape(*batch, padded_rows // 128, padded_columns // 4, 32, 4, 4)
    # (row tile, column tile, row % 32, row // 32, column) -> (row tile, row // 32, row % 32, column tile, column)
    plain = np.moveaxis(tiles, (-5, -2, -3, -4, -1), (-5, -4, -3, -2, -1)).reshape(scales.shape)
    return plain[..., :rows, :columns]


def mxfp8(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """e4m3 [out, in] x 2^(E8M0 - 127) -> float32 [out, in]; the scale byte 255 is not a number."""
    rows, columns = weight.shape
    factors = _E8M0[unswizzle(scale, rows, columns // 32)]
    values = weight.astype(np.float32).reshape(rows, columns // 32, 32) * factors[..., None]
    return values.reshape(rows, columns)


def mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Packed E2M1 [..., in / 32, 16] x 2^(E8M0 - 127) [..., in / 32] -> float32 [..., in].

    The low nibble is the even element.
    """
    values = E2M1[np.stack([blocks & 15, blocks >> 4], -1)].reshape(*blocks.shape[:-1], 32)
    with np.errstate(over="ignore"):
        return (values * _E8M0[scales][..., None]).reshape(*blocks.shape[:-2], -1)


def nvfp4(weight: np.ndarray, scale: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Packed E2M1 [..., out, in / 2] x e4m3 x float32 [...] -> float32 [..., out, in].

    The high nibble is the even element, the opposite of MXFP4.
    """
    rows, columns = weight.shape[-2], 2 * weight.shape[-1]
    values = E2M1[np.stack([weight >> 4, weight & 15], -1)].reshape(*weight.shape[:-1], columns // 16, 16)
    factors = unswizzle(scale, rows, columns // 16).astype(np.float32)
    factors = factors * second.reshape(*weight.shape[:-2], 1, 1)
    return (values * factors[..., None]).reshape(*weight.shape[:-1], columns)


def _read_mxfp8(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    # Copied: reading the second tensor may let go of the first.
    return mxfp8(np.array(tensors[name]), tensors[f"{name}_scale"])


def _read_mxfp4(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return mxfp4(tensors[name + BLOCKS], tensors[name + SCALES])


def _read_nvfp4(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    weight, scale = np.array(tensors[name]), np.array(tensors[f"{name}_scale"])
    return nvfp4(weight, scale, tensors[f"{name}_scale_2"])
