"""The arithmetic of quantised layouts: packed numbers and scales to float32.

MXFP8 and NVFP4 as ComfyUI writes them keep one scale for a few neighbouring inputs, in the "swizzled" order that cuBLAS
reads: tiles of 128 rows by 4 scale columns, and in a tile row r and column c at (r % 32) * 16 + (r // 32) * 4 + c.
"""

import functools

import numpy as np

# Values of the sixteen codes of E2M1.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

# Values of the bytes of E8M0; 255 is not a number.
_E8M0 = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))


def unswizzle(scales: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Scales [..., 128 x, 4 y] in the order of cuBLAS -> [..., rows, columns], the padding cut off."""
    *batch, padded_rows, padded_columns = scales.shape
    tiles = scales.reshape(*batch, padded_rows // 128, padded_columns // 4, 32, 4, 4)
    # (row tile, column tile, row % 32, row // 32, column) -> (row tile, row // 32, row % 32, column tile, column)
    plain = np.moveaxis(tiles, (-5, -2, -3, -4, -1), (-5, -4, -3, -2, -1)).reshape(scales.shape)
    return plain[..., :rows, :columns]


def mxfp8(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """e4m3 [..., out, in] x 2^(E8M0 - 127) -> float32 [..., out, in]; the scale byte 255 is not a number.

    scale: uint8, in the order of cuBLAS and padded, or [..., out, in / 32] row by row where that is another shape.
    """
    rows, columns = weight.shape[-2], weight.shape[-1] // 32
    padded = scale.shape[-2] % 128 == 0 and scale.shape[-1] % 4 == 0
    factors = _E8M0[unswizzle(scale, rows, columns) if padded else scale]
    values = weight.astype(np.float32).reshape(*weight.shape[:-1], columns, 32) * factors[..., None]
    return values.reshape(weight.shape)


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


def affine(weight: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """MLX: unsigned numbers of 4 or 8 bits, lowest first in uint32 [..., in * bits / 32], times scale plus bias.

    scales, biases: [..., in / 64], any float. Returns float32 [..., in].
    """
    codes = weight.astype("<u4").view(np.uint8)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1)
    grouped = codes.reshape(*scales.shape, 64).astype(np.float32)
    values = grouped * scales.astype(np.float32)[..., None] + biases.astype(np.float32)[..., None]
    return values.reshape(*scales.shape[:-1], -1)


def unrotate(weight: np.ndarray, group: int) -> np.ndarray:
    """Takes ConvRot back: every `group` inputs of [..., in] were multiplied with a regular Hadamard matrix.

    The matrix is symmetric and orthonormal, so that the same product takes it back.
    """
    return (weight.reshape(*weight.shape[:-1], -1, group) @ hadamard(group)).reshape(weight.shape)


@functools.cache
def hadamard(size: int) -> np.ndarray:
    """The regular Hadamard matrix [size, size] of ConvRot, not Sylvester's: powers of one of 4 by 4; orthonormal."""
    base = np.ones((4, 4), np.float32) - 2 * np.eye(4, dtype=np.float32)[::-1]
    result = base
    while len(result) < size:
        result = np.kron(result, base)
    return result / np.float32(size**0.5)
