"""Each layout other programs write, made of the small release: what it converts to is what the release converts to."""

import json
import random
import shutil
import sys

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lens_jax import cli
from lens_jax.convert import component, denoiser, folder, gpt_oss, native, quantized_numbers, source, writer
from lens_jax.convert.gguf import GgufFile, repack
from lens_jax.encoders.gpt_oss import encode_tokens
from lens_jax.errors import LensError
from lens_jax.inference.pipeline import LensPipeline
from lens_jax.models import mxfp4

KIND = gguf.GGMLQuantizationType
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def release(goldens):
    return goldens / "tiny_release"


@pytest.fixture
def released_is_tiny(release, monkeypatch):
    """Files without a config are of the released size; here that of the small release."""
    for part in component.COMPONENTS:
        monkeypatch.setitem(part.__dict__, "released", part.config(release))


def tensors_of(release, part) -> dict[str, np.ndarray]:
    return dict(folder.open_component(release / part))


def convert(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", "to-jax", *map(str, argv)])
    assert stop.value.code in (None, 0), capsys.readouterr().err
    return capsys.readouterr().out


def assert_same_leaves(actual, expected, names):
    for name in names:
        one, other = folder.open_component(actual / name), folder.open_component(expected / name)
        assert set(one) == set(other)
        for path in other:
            assert one[path].tobytes() == other[path].tobytes(), path


def swizzle(scales: np.ndarray) -> np.ndarray:
    """[rows, columns] -> the order of cuBLAS, by the inverse of the reader (which has a test of its own)."""
    padded = (-(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4)
    places = quantized_numbers.unswizzle(np.arange(padded[0] * padded[1]).reshape(padded), *scales.shape)
    flat = np.zeros(padded[0] * padded[1], scales.dtype)
    flat[places] = scales
    return flat.reshape(padded)


def make_nvfp4(release) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(file of ComfyUI, the same numbers as transformers has them without quantisation)."""
    rng, file, plain = np.random.default_rng(0), {}, {}
    file["tokenizer_json"] = np.frombuffer(b'{"version": "1.0"}', np.uint8)
    for name, array in tensors_of(release, "text_encoder").items():
        if name == "lm_head.weight":
            continue
        if name.endswith("_blocks"):
            base, experts, rows = name.removesuffix("_blocks"), *array.shape[:2]
            weight = rng.integers(0, 256, (experts, rows, 32), np.uint8)
            scales = rng.uniform(0.1, 4, (experts, rows, 4)).astype(ml_dtypes.float8_e4m3fn)
            second = rng.uniform(0.01, 0.02, experts).astype(np.float32)
            comfy = base.removeprefix("model.")
            file[f"{comfy}.weight"], file[f"{comfy}.weight_scale_2"] = weight, second
            file[f"{comfy}.weight_scale"] = np.stack([swizzle(s) for s in scales])
            file[f"{comfy}.comfy_quant"] = np.frombuffer(b'{"format": "nvfp4"}', np.uint8)
            codes = np.stack([weight >> 4, weight & 15], -1).reshape(experts, rows, 64)
            factors = np.repeat(scales.astype(np.float32) * second[:, None, None], 16, -1)
            plain[base] = np.ascontiguousarray((quantized_numbers.E2M1[codes] * factors).swapaxes(1, 2))
        elif not name.endswith("_scales"):
            plain[name] = array
            file[name.removeprefix("model.").replace("_proj_bias", "_proj.bias")] = array
    return file, plain


def make_llama_cpp(release, path, up=KIND.MXFP4):
    """A GGUF of the text encoder as convert_hf_to_gguf.py writes it; `up` is the type of one of the three experts."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, 6)
    get = lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))
    file = gguf.GGUFWriter(path, "gpt-oss")
    file.add_token_list([f"token {i}" for i in range(500)])
    file.add_block_count(6)
    tensors = tensors_of(release, "text_encoder")

    def packed(name, blocks, scales):
        codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:-1], 32)
        ggml = codes[..., :16] | codes[..., 16:] << 4
        data = np.concatenate([scales[..., None], ggml], -1).reshape(*blocks.shape[:2], -1)
        if "up_proj" in name and up != KIND.MXFP4:
            file.add_tensor(get(name), gguf.quants.dequantize(data, KIND.MXFP4))
        else:
            file.add_tensor(get(name), np.ascontiguousarray(data), raw_dtype=KIND.MXFP4)

    for name, array in tensors.items():
        base = name.rsplit("_", 1)[0]
        if name.endswith("_blocks"):
            scales = tensors[f"{base}_scales"]
            parts = ("down_proj",) if "down" in name else ("gate_proj", "up_proj")
            for i, part in enumerate(parts):
                rows = slice(i, None, len(parts))
                where = f"{base.rpartition('.')[0]}.{part}.weight"
                packed(where, array[:, rows], scales[:, rows])
        elif "gate_up_proj_bias" in name:
            for i, part in enumerate(("gate_proj", "up_proj")):
                part_name = name.replace("gate_up_proj_bias", f"{part}.bias")
                file.add_tensor(get(part_name), np.ascontiguousarray(array[:, i::2]))
        elif not name.endswith("_scales"):
            suffix = ".weight" if name.endswith("sinks") else ""
            file.add_tensor(get(name.replace("_proj_bias", "_proj.bias")) + suffix, np.ascontiguousarray(array))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def test_nvfp4_text_encoder(capsys, release, tmp_path, released_is_tiny):
    """With NVFP4 experts: the tree, and the features, of the same numbers in transformers' dense layout."""
    file, plain = make_nvfp4(release)
    writer.write_file(tmp_path / "te.safetensors", file)
    out = convert(capsys, tmp_path / "te.safetensors", tmp_path / "ours", "--verify")
    assert "te.safetensors: the text encoder" in out
    assert "equal to the bit" in out
    config = gpt_oss.read_config(tmp_path / "ours" / "release" / "text_encoder" / "config.json", dtype="float32")
    assert not config.packed
    expected = gpt_oss.from_release(config, {k: v for k, v in plain.items() if k != "model.norm.weight"}, "plain")
    actual = native.load_params(tmp_path / "ours", "text_encoder")
    assert set(actual) == set(expected) == {"embed", "layers"}
    ids = np.arange(12).reshape(2, 6)
    features = [encode_tokens(config, params, ids, [6, 4], (1, 5)) for params in (actual, expected)]
    np.testing.assert_array_equal(*features)
    kernel = actual["layers"]["experts"]["gate_up"]["kernel"]
    np.testing.assert_array_equal(kernel[3], plain["model.layers.3.mlp.experts.gate_up_proj"])
    tokenizer = tmp_path / "ours" / "release" / "tokenizer" / "tokenizer.json"
    assert json.loads(tokenizer.read_text()) == {"version": "1.0"}


def test_dense_experts_compute_what_packed_ones_do(release):
    path = release / "text_encoder"
    config = gpt_oss.read_config(path / "config.json", dtype="float32")
    params = gpt_oss.from_release(config, folder.open_component(path), "packed", head=False)
    dense = gpt_oss.config_from_release({**config_values(path), "quantization_config": None}, "dense", dtype="float32")
    experts = {
        name: {"kernel": mxfp4.dequantise(p["blocks"], p["scales"]).swapaxes(-1, -2), "bias": p["bias"]}
        for name, p in params["layers"]["experts"].items()
    }
    unpacked = {**params, "layers": {**params["layers"], "experts": experts}}
    ids = np.arange(12).reshape(2, 6)
    one = encode_tokens(config, params, ids, [6, 4], (0, 5))
    other = encode_tokens(dense, unpacked, ids, [6, 4], (0, 5))
    # Sums in another order, float32 through six layers; rows past a length mean nothing.
    for row, length in enumerate((6, 4)):
        difference = np.linalg.norm(one[:, row, :length] - other[:, row, :length])
        assert difference <= 1e-5 * np.linalg.norm(one[:, row, :length])


def config_values(path) -> dict:
    return folder.read_json(path / "config.json")


def test_gguf_text_encoder(capsys, release, tmp_path):
    """llama.cpp's file with MXFP4 experts gives the bytes of the release; with other experts their dense values."""
    native.to_jax(source.find(release), tmp_path / "expected", "lens")
    make_llama_cpp(release, tmp_path / "te.gguf")
    out = convert(
        capsys, release, tmp_path / "ours", "--variant", "lens", "--text-encoder", tmp_path / "te.gguf", "--verify"
    )
    assert "te.gguf: the text encoder, 117 tensors" in out
    assert_same_leaves(tmp_path / "ours", tmp_path / "expected", ("denoiser", "autoencoder", "text_encoder"))
    config = "release/text_encoder/config.json"
    assert (tmp_path / "ours" / config).read_bytes() == (release / "text_encoder" / "config.json").read_bytes()

    make_llama_cpp(release, tmp_path / "mixed.gguf", up=KIND.F32)
    native.to_jax(source.find(release, {"text_encoder": tmp_path / "mixed.gguf"}), tmp_path / "dense", "lens")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / config).read_text())
    actual = native.load_params(tmp_path / "dense", "text_encoder")["layers"]["experts"]
    expected = native.load_params(tmp_path / "expected", "text_encoder")["layers"]["experts"]
    for name, p in expected.items():
        values = mxfp4.dequantise(jnp.asarray(p["blocks"]), jnp.asarray(p["scales"])).swapaxes(-1, -2)
        np.testing.assert_array_equal(actual[name]["kernel"], values)
        np.testing.assert_array_equal(actual[name]["bias"], p["bias"])


def test_mxfp4_of_gguf_is_repacked_exactly():
    """Every nibble and every finite scale, against the dequantisation of the package."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (255, 4, 17), np.uint8)
    raw[..., 0] = np.arange(255)[:, None]
    with np.errstate(over="ignore"):  # the largest scale times 6
        expected = gguf.quants.dequantize(raw.reshape(255, -1), KIND.MXFP4)
    actual = quantized_numbers.mxfp4(repack(raw[..., 1:]), raw[..., 0])
    # Not by bytes: a code for -0 is 0 in the package.
    np.testing.assert_array_equal(actual, expected)
    usual = slice(40, 200)  # the device flushes what is below 2^-126 to zero
    ours = mxfp4.dequantise(jnp.asarray(repack(raw[usual, :, 1:])), jnp.asarray(raw[usual, :, 0]))
    np.testing.assert_array_equal(ours.reshape(160, -1), expected[usual])


def test_gguf_denoiser(release, tmp_path):
    """Types of every sort in one file: each tensor is what the package dequantises it to."""
    tensors = tensors_of(release, "transformer")
    # Rows of 256 and not of 96 exist for w2 alone, and K-quants need them.
    kinds = (KIND.F32, KIND.F16, KIND.BF16, KIND.Q8_0, KIND.Q4_0, KIND.Q5_1, KIND.MXFP4)
    file, expected = gguf.GGUFWriter(tmp_path / "lens.gguf", "lens"), {}
    for i, (name, array) in enumerate(tensors.items()):
        kind = kinds[i % len(kinds)] if array.ndim == 2 else KIND.F32
        if array.shape[-1] == 256:
            data = np.random.default_rng(i).integers(0, 100, (array.shape[0], 144), np.uint8)
            kind = KIND.Q4_K
        else:
            data = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        plain = kind in (KIND.F32, KIND.F16)
        file.add_tensor(name, data, **({} if plain else {"raw_dtype": kind}))
        expected[name] = gguf.quants.dequantize(data, kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    config = denoiser.read_config(release / "transformer" / "config.json", dtype="float32", param_dtype="float32")
    params = denoiser.from_release(config, folder.open_component(tmp_path / "lens.gguf"), "lens.gguf")
    for name, array in denoiser.to_release(config, params).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_single_files_and_bundles(capsys, release, tmp_path, released_is_tiny):
    """Three files, or one with three prefixes: the folder the release gives."""
    native.to_jax(source.find(release), tmp_path / "expected", "lens")
    prefixes = {
        "transformer": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "text_encoders.gpt_oss.transformer.",
    }
    bundle = {}
    for part, prefix in prefixes.items():
        tensors = tensors_of(release, part)
        if part == "text_encoder":
            tensors = {name.removeprefix("model."): array for name, array in tensors.items()}
        bundle.update({prefix + name: array for name, array in tensors.items()})
        writer.write_file(tmp_path / f"{part}.safetensors", tensors)
    writer.write_file(tmp_path / "lens_turbo.safetensors", bundle)
    names = ("denoiser", "autoencoder", "text_encoder")
    out = convert(capsys, tmp_path / "lens_turbo.safetensors", tmp_path / "one", "--verify")
    assert out.count("recognised") == 3
    assert_same_leaves(tmp_path / "one", tmp_path / "expected", names)
    assert json.loads((tmp_path / "one" / "lens.json").read_text())["variant"] == "turbo"
    flags = ("--autoencoder", tmp_path / "vae.safetensors", "--text-encoder", release)
    convert(capsys, tmp_path / "transformer.safetensors", tmp_path / "mixed", "--variant", "lens", *flags)
    assert_same_leaves(tmp_path / "mixed", tmp_path / "expected", names)

    # The small text encoder has fewer layers than the released denoiser reads.
    shutil.copy(release / "transformer" / "config.json", tmp_path / "one" / "release" / "transformer")
    pipe = LensPipeline.from_pretrained(tmp_path / "one", dtype="float32")
    assert pipe.num_inference_steps == 4
    with pytest.raises(LensError, match="no tokenizer"):
        pipe("a red apple", height=64, width=64)
    convert(capsys, tmp_path / "vae.safetensors", tmp_path / "part")
    with pytest.raises(LensError, match=r"holds no denoiser and no text_encoder; give --denoiser PATH, --text"):
        LensPipeline.from_pretrained(tmp_path / "part")


def test_what_is_not_recognised_is_said(release, tmp_path):
    writer.write_file(tmp_path / "x.safetensors", {"txt_norm.weight": np.zeros(3, np.float32)})
    with pytest.raises(
        LensError, match=r"x.safetensors: holds no network of Lens \(the denoiser has txt_norm.0.weight"
    ):
        source.find(tmp_path / "x.safetensors")
    with pytest.raises(LensError, match=r"no text encoder in it; looked for layers.0.self_attn.sinks"):
        source.find(release, {"text_encoder": release / "vae"})
    with pytest.raises(LensError, match=r"no tokenizer.json"):
        source.find(release, {"tokenizer": tmp_path})
    with pytest.raises(LensError, match=r"'textencoder' \(did you mean 'text_encoder'\?\) is no part"):
        source.find(release, {"textencoder": tmp_path})


@pytest.mark.parametrize("kind", ["nvfp4", "llama.cpp"])
def test_damaged_layouts(release, tmp_path, kind):
    """Tensors lost, renamed, misshapen or of another type: one line, or the leaves."""
    if kind == "nvfp4":
        tensors = make_nvfp4(release)[0]
    else:
        make_llama_cpp(release, tmp_path / "te.gguf")
        tensors = dict(folder.open_component(tmp_path / "te.gguf"))
    values, rng, refused = config_values(release / "text_encoder"), random.Random(0), 0
    config = gpt_oss.config_from_release(gpt_oss.with_experts(values, kind != "nvfp4"), "config.json")
    for _ in range(60):
        damaged = dict(tensors)
        name, other = rng.sample(list(tensors), 2)
        change = rng.randrange(5)
        if change == 0:
            del damaged[name]
        elif change == 1:
            damaged[other] = damaged.pop(name)
        elif change == 2:
            damaged[name] = damaged[name].reshape(rng.choice(((-1,), (1, -1), (-1, 1, 1), (1, 1, 1, -1))))
        elif change == 3:
            damaged[name] = damaged[name].reshape(-1)[:1].reshape(()).astype(rng.choice((np.uint8, np.float32, BF16)))
        else:
            damaged[name.replace("exps", "exp").replace("layers", "layer")] = damaged.pop(name)
        message = ""
        try:
            lazy = gpt_oss.leaves(config, damaged, "file")
            assert all(lazy[path].shape == lazy.shape(path) for path in ("embed", "layers/experts/gate_up/bias"))
        except LensError as error:
            message = str(error)
        assert len(message.splitlines()) <= 1
        refused += bool(message)
    assert refused >= 40


def test_without_the_package_gguf_is_named(monkeypatch, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LensError, match=r"pip install 'lens-jax\[gguf\]'"):
        GgufFile(tmp_path / "x.gguf")
