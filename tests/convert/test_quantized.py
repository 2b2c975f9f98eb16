"""MXFP8 and NVFP4 files against loops that follow the description of the layouts word by word."""

import json

import ml_dtypes
import numpy as np
import pytest

from lens_jax.convert import denoiser, folder, quantized, quantized_numbers
from lens_jax.errors import LensError


def swizzled(scales: np.ndarray) -> np.ndarray:
    """[rows, columns] -> the padded array in the order of cuBLAS, one element at a time."""
    rows, columns = scales.shape
    padded = (-(-rows // 128) * 128, -(-columns // 4) * 4)
    flat = np.zeros(padded[0] * padded[1], scales.dtype)
    column_tiles = padded[1] // 4
    for r in range(rows):
        for c in range(columns):
            g = (r // 128) * column_tiles + c // 4
            flat[(g * 32 + r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = scales[r, c]
    return flat.reshape(padded)


def said(kind: str, **more) -> np.ndarray:
    return np.frombuffer(json.dumps({"format": kind, **more}).encode(), np.uint8)


def make_mxfp8(rng, rows: int, columns: int):
    weight = rng.standard_normal((rows, columns), np.float32).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.integers(110, 140, (rows, columns // 32), np.uint8)
    expected = np.zeros((rows, columns), np.float32)
    for r in range(rows):
        for c in range(columns):
            expected[r, c] = float(weight[r, c]) * 2.0 ** (int(scales[r, c // 32]) - 127)
    return weight, swizzled(scales), expected


@pytest.mark.parametrize("shape", [(128, 128), (130, 192), (40, 32), (257, 64)])
def test_mxfp8(shape):
    weight, scale, expected = make_mxfp8(np.random.default_rng(0), *shape)
    tensors = {"x.weight": weight, "x.weight_scale": scale, "x.comfy_quant": said("mxfp8")}
    plain = quantized.dequantize({**tensors, "x.bias": np.ones(3, np.float32)}, "file")
    assert set(plain) == {"x.weight", "x.bias"}
    assert (plain.dtype("x.weight"), plain.shape("x.weight")) == (np.float32, shape)
    assert np.array_equal(plain["x.weight"], expected)
    # Four bits of mantissa and a power of two: bfloat16 would hold it too.
    assert np.array_equal(expected.astype(ml_dtypes.bfloat16), expected)


def test_ends_of_the_scale_of_mxfp8():
    weight, scale = np.ones((1, 96), ml_dtypes.float8_e4m3fn), swizzled(np.array([[0, 254, 255]], np.uint8))
    actual = quantized_numbers.mxfp8(weight, scale)[0, ::32]
    assert actual[:2].tolist() == [2.0**-127, 2.0**127]
    assert np.isnan(actual[2])


@pytest.mark.parametrize("batch", [(), (2,)])
def test_nvfp4(batch):
    rng, rows, columns = np.random.default_rng(0), 132, 48
    codes = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    weight = rng.integers(0, 256, (*batch, rows, columns // 2), np.uint8)
    scales = rng.uniform(0.1, 400, (*batch, rows, columns // 16)).astype(ml_dtypes.float8_e4m3fn)
    second = rng.uniform(0.001, 0.1, batch).astype(np.float32)
    expected = np.zeros((*batch, rows, columns), np.float32)
    for index in np.ndindex(*batch, rows, columns):
        *e, r, c = index
        byte = int(weight[(*e, r, c // 2)])
        code = byte >> 4 if c % 2 == 0 else byte & 15
        expected[index] = codes[code] * (np.float32(scales[(*e, r, c // 16)]) * second[tuple(e)])
    scale = swizzled(scales) if not batch else np.stack([swizzled(s) for s in scales])
    tensors = {"e.weight": weight, "e.weight_scale": scale, "e.weight_scale_2": second, "e.comfy_quant": said("nvfp4")}
    plain = quantized.dequantize(tensors, "file")
    assert list(plain) == ["e.weight"]
    assert np.array_equal(plain["e.weight"], expected)


def test_a_quantised_denoiser_loads(goldens):
    """The matrices of blocks as MXFP8, behind a prefix: the tree holds exactly what they stand for."""
    path = goldens / "tiny_release" / "transformer"
    config = denoiser.read_config(path / "config.json", dtype="float32")
    tensors, rng = dict(folder.open_component(path)), np.random.default_rng(0)
    expected = {}
    for name in [n for n in tensors if n.startswith("transformer_blocks.") and tensors[n].ndim == 2]:
        scales = rng.integers(118, 124, (tensors[name].shape[0], tensors[name].shape[1] // 32), np.uint8)
        factors = np.exp2(np.repeat(scales, 32, axis=1).astype(np.float32) - 127)
        tensors[name] = (tensors[name] / factors).astype(ml_dtypes.float8_e4m3fn)
        expected[name] = tensors[name].astype(np.float32) * factors
        base = name.removesuffix(".weight")
        tensors[f"{base}.weight_scale"] = swizzled(scales)
        tensors[f"{base}.comfy_quant"] = np.frombuffer(b'{"format": "mxfp8"}', np.uint8)
    assert len(expected) == 24
    tensors = {f"model.diffusion_model.{name}": array for name, array in tensors.items()}
    back = denoiser.to_release(config, denoiser.from_release(config, tensors, "comfy"))
    for name, array in expected.items():
        assert np.array_equal(back[name], array)


def test_what_does_not_fit_is_named():
    weight, scale, _ = make_mxfp8(np.random.default_rng(0), 64, 64)
    for change, message in (
        ({"x.weight_scale": scale[:, :1]}, r"x.weight_scale is \[128, 1\], expected \[128, 4\] for \[64, 64\]"),
        ({"x.weight_scale": np.ones((), np.float32)}, "x.weight_scale is float32; accepted: uint8"),
        ({"x.weight": weight[:, :40]}, "x.weight_scale is"),
        ({"x.weight": weight[0]}, r"accepted: \[out, in\] or"),
        ({"x.weight_scale_2": np.ones((), np.float32)}, "weight_scale_2 belongs to nvfp4"),
        ({"x.comfy_quant": said("mxfp9")}, "x is quantised as 'mxfp9'; accepted: float8_e4m3fn"),
        ({"x.comfy_quant": said("mxfp8", scale_layout="row_major")}, "says 'scale_layout' of mxfp8"),
        ({"x.comfy_quant": said("mxfp8", convrot=True)}, "says 'convrot' of mxfp8"),
        ({"x.comfy_quant": said("mxfp8", group_size=16)}, "group_size is 16; accepted for mxfp8: 32"),
        ({"x.comfy_quant": said("nvfp4")}, "comfy_quant says nvfp4, which is uint8"),
        ({"x.comfy_quant": said("mxfp8", orig_shape=[64, 500])}, "orig_shape is"),
        ({"x.comfy_quant": said(["mxfp8"])}, "quantised as"),
        ({"x.comfy_quant": np.zeros(9, np.uint8)}, "not a JSON object"),
        ({"x.comfy_quant": np.frombuffer(b"[]", np.uint8)}, "not a JSON object"),
        ({"x.comfy_quant": None}, "nothing says how they are laid out"),
        ({"x.weight_scale": None}, "x.weight_scale is missing; comfy_quant says mxfp8"),
        ({"x.weight": np.ones((64, 64), np.int8), "x.weight_scale": None, "x.comfy_quant": None}, "without a scale"),
        ({"x.zero_point": np.ones(3, np.float32)}, "is quantised by SDNQ"),
        ({"y.qweight": np.ones(3, np.int32)}, "is quantised by GPTQ, AWQ or SVDQuant"),
        ({"y.weight": weight}, "y.weight is float8_e4m3fn without a scale"),
    ):
        tensors = {"x.weight": weight, "x.weight_scale": scale, "x.comfy_quant": said("mxfp8"), **change}
        with pytest.raises(LensError, match=message) as error:
            quantized.dequantize({name: array for name, array in tensors.items() if array is not None}, "file")
        assert len(str(error.value)) < 300


def test_float_scales_that_do_not_fit_are_named():
    ones = lambda *shape: np.ones(shape, np.float32)
    for kind, shape, more in (
        ("int8_tensorwise", (3,), {}),
        ("int8_tensorwise", (1, 8), {}),
        ("int8_tensorwise", (8,), {"convrot": True}),
        ("int8_tensorwise", (8,), {"convrot": True, "convrot_groupsize": 8}),
        ("int8_tensorwise", (8,), {"convrot": "yes", "convrot_groupsize": 16}),
        ("int8_blockwise", (2, 2), {"group_size": 5}),
        ("int8_blockwise", (2, 2), {"group_size": True}),
        ("int8_blockwise", (2, 2), {}),
    ):
        tensors = {
            "x.weight": np.ones((8, 16), np.int8),
            "x.weight_scale": ones(*shape),
            "x.comfy_quant": said(kind, **more),
        }
        with pytest.raises(LensError, match=r"file: x"):
            quantized.dequantize(tensors, "file")
    packed = {"x.weight": np.zeros((8, 16), np.uint32), "x.scales": ones(8, 2), "x.biases": ones(8, 2)}
    assert quantized.dequantize(packed, "file").shape("x.weight") == (8, 128)
    for change in ({"x.scales": ones(8, 3)}, {"x.biases": ones(8, 3)}, {"x.scales": ones(4, 2)}, {"x.scales": ones()}):
        with pytest.raises(LensError, match=r"file: x.weight is uint32"):
            quantized.dequantize({**packed, **change}, "file")
