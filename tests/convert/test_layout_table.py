"""Every layout that the table of docs/checkpoints.md names: built small, read, and compared number by number.

Two errors of each, relative norms over all tensors: of reading, from the numbers that the file stands for, worked out
here in another way; and of the layout, from the release it was made of.
"""

import dataclasses
import json
import random
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lens_jax.convert import component, folder, gpt_oss, quantized_numbers, source, writer
from lens_jax.convert.table import specs_of
from lens_jax.errors import LensError

E4M3, E5M2, E8M0 = (np.dtype(d) for d in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu))
BF16 = np.dtype(ml_dtypes.bfloat16)
DOC = Path(__file__).parents[2] / "docs" / "checkpoints.md"

File = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def release(goldens):
    return {part: dict(folder.open_component(goldens / "tiny_release" / part)) for part in FOLDERS.values()}


@pytest.fixture(autouse=True)
def released_is_tiny(goldens, monkeypatch):
    """Files without a config are of the released size; here that of the small release."""
    for part in component.COMPONENTS:
        monkeypatch.setitem(part.__dict__, "released", part.config(goldens / "tiny_release"))


FOLDERS = {"denoiser": "transformer", "autoencoder": "vae", "text_encoder": "text_encoder"}


def note(kind: str, **more) -> np.ndarray:
    return np.frombuffer(json.dumps({"format": kind, **more}).encode(), np.uint8)


def spread(values: np.ndarray, group: int) -> np.ndarray:
    return np.repeat(values.astype(np.float32), group, -1)


def swizzle(scales: np.ndarray) -> np.ndarray:
    """[..., rows, columns] -> the order of cuBLAS, an element at a time."""
    if scales.ndim > 2:
        return np.stack([swizzle(one) for one in scales])
    rows, columns = scales.shape
    out = np.zeros((-(-rows // 128) * 128, -(-columns // 4) * 4), scales.dtype)
    flat, tiles = out.reshape(-1), out.shape[1] // 4
    for r, c in np.ndindex(rows, columns):
        flat[((r // 128 * tiles + c // 4) * 32 + r % 32) * 16 + r % 128 // 32 * 4 + c % 4] = scales[r, c]
    return out


# Each takes a matrix [..., out, in] and gives (what lies beside `X.`, the numbers that this stands for).


def fp8_scaled(w, dtype=E4M3, scale="weight_scale", rowwise=False, said=None, **more):
    top = float(ml_dtypes.finfo(dtype).max)
    axes = -1 if rowwise else tuple(range(w.ndim))
    s = (np.abs(w).max(axes, keepdims=rowwise) / top).astype(np.float32)
    q = (w / s).astype(dtype)
    return {"weight": q, scale: s, **({"comfy_quant": said} if said is not None else {}), **more}, q.astype("f4") * s


def fp8_blockwise(w):
    g, (rows, columns) = 16, w.shape
    tiles = np.abs(w.reshape(rows // g, g, columns // g, g)).max((1, 3))
    s = (tiles / 448).astype(np.float32)
    whole = s.repeat(g, 0).repeat(g, 1)
    q = (w / whole).astype(E4M3)
    said = note("float8_e4m3fn_blockwise", group_size=g, orig_dtype="torch.bfloat16")
    return {"weight": q, "weight_scale": s, "comfy_quant": said}, q.astype("f4") * whole


def int8(w, convrot=0, rowwise=False):
    said = {"convrot": True, "convrot_groupsize": convrot} if convrot else {}
    one = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2.0
    turn = np.kron(one, one) if convrot else None
    rotated = (w.reshape(*w.shape[:-1], -1, convrot) @ turn.T).reshape(w.shape) if convrot else w
    s = (np.abs(rotated).max(-1 if rowwise else None, keepdims=rowwise) / 127).astype(np.float32)
    q = np.clip(np.round(rotated / s), -127, 127).astype(np.int8)
    plain = q.astype("f8") * s
    if convrot:
        plain = (plain.reshape(*w.shape[:-1], -1, convrot) @ np.linalg.inv(turn).T).reshape(w.shape)
    s = s[..., 0] if rowwise else s
    return {"weight": q, "weight_scale": s, "comfy_quant": note("int8_tensorwise", **said)}, plain.astype("f4")


def mx_fp8(w, dtype="uint8", kind="mxfp8", rows=False, **more):
    amax = np.abs(w.reshape(*w.shape[:-1], -1, 32)).max(-1)
    s = np.clip(np.floor(np.log2(np.maximum(amax, 1e-30))) - 8 + 127, 0, 254).astype(np.uint8)
    factors = spread(np.exp2(s.astype("f4") - 127), 32)
    q = np.clip(w / factors, -448, 448).astype(E4M3)
    stored = (s if rows else swizzle(s)).view(dtype)
    return {"weight": q, "weight_scale": stored, "comfy_quant": note(kind, group_size=32), **more}, q.astype(
        "f4"
    ) * factors


def nv_fp4(w):
    second = np.abs(w).max((-2, -1)).astype(np.float32) / np.float32(448 * 6)
    amax = np.abs(w.reshape(*w.shape[:-1], -1, 16)).max(-1)
    s = (amax / 6 / second[..., None, None]).astype(E4M3)
    factors = spread(s, 16) * second[..., None, None]
    table = quantized_numbers.E2M1
    codes = np.abs(w[..., None] / np.maximum(factors, 1e-30)[..., None] - table).argmin(-1).astype(np.uint8)
    packed = codes[..., 0::2] << 4 | codes[..., 1::2]
    file = {"weight": packed, "weight_scale": swizzle(s), "weight_scale_2": second, "comfy_quant": note("nvfp4")}
    return file, table[codes] * factors


def mlx(w, bits):
    groups = w.reshape(*w.shape[:-1], -1, 64)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    s = ((high - low) / (2**bits - 1)).astype(BF16)
    b = low.astype(BF16)
    q = np.clip(np.round((groups - b.astype("f4")) / s.astype("f4")), 0, 2**bits - 1).astype(np.uint32)
    packed = sum(q.reshape(*w.shape[:-1], -1, 32 // bits)[..., i] << np.uint32(bits * i) for i in range(32 // bits))
    plain = (q * s.astype("f4") + b.astype("f4")).reshape(w.shape)
    return {"weight": packed.astype(np.uint32), "scales": s[..., 0], "biases": b[..., 0]}, plain


# Each takes the release's tensors of a network and gives (the file, the numbers it stands for by the release's names).


def whole(rename=lambda name: name, dtype=None, extra=()):
    def make(tensors: File):
        cast = lambda a: a.astype(dtype) if dtype is not None and a.dtype == np.float32 else a
        file = {rename(name): cast(array) for name, array in tensors.items()}
        return {**file, **dict(extra)}, {name: cast(array).astype("f4") for name, array in tensors.items()}

    return make


def matrices(quantise, multiple=1, rename=lambda name: name, extra=()):
    """The matrices of blocks quantised where their inputs allow it, all else as it is."""

    def make(tensors: File):
        file, plain = dict(extra), {}
        for name, array in tensors.items():
            plain[name] = array
            if name.startswith("transformer_blocks.") and array.ndim == 2 and array.shape[1] % multiple == 0:
                beside, plain[name] = quantise(np.asarray(array, np.float32))
                file.update({f"{rename(name).removesuffix('weight')}{end}": a for end, a in beside.items()})
            else:
                file[rename(name)] = array
        return file, plain

    return make


def in_header(tensors: File):
    file, plain = matrices(fp8_scaled)(tensors)
    layers = {n.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for n in file if n.endswith("weight_scale")}
    return file, plain, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def split_qkv(tensors: File):
    file = {}
    for name, array in tensors.items():
        ours = next((p for p in SPLIT if p in name), None)
        parts = np.split(array, 3) if ours else []
        file.update({name.replace(ours, f"attn.{new}."): part for new, part in zip(SPLIT.get(ours, ()), parts)})
        if not ours:
            file[name] = array
    return file, tensors


SPLIT = {
    "attn.img_qkv.": ("to_q", "to_k", "to_v"),
    "attn.txt_qkv.": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def to_ldm(tensors: File, outer: bool, last: bool):
    """The autoencoder by the names of LDM; with `last` convolutions as MLX lays them out."""
    from lens_jax.convert import autoencoder

    config = component.COMPONENTS[1].released
    file = {}
    for new, old in zip(autoencoder.rules(config, ldm=True), autoencoder.rules(config)):
        if old.name in tensors:
            name = re.sub(r"^(en|de)coder\.((post_)?quant_conv)", r"\2", new.name) if outer else new.name
            array = tensors[old.name].reshape(new.shape)
            file[name] = np.moveaxis(array, 1, -1) if last and array.ndim == 4 else array
    return file, tensors


def ohwi(tensors: File):
    file, plain = whole(dtype=BF16)(tensors)
    return {name: np.moveaxis(a, 1, -1) if a.ndim == 4 else a for name, a in file.items()}, plain


def dense(tensors: File) -> dict[str, np.ndarray]:
    """Experts of the release as [experts, out, in], by the name of their module."""
    result = {}
    for name, blocks in tensors.items():
        if name.endswith("_blocks"):
            result[name.removesuffix("_blocks")] = quantized_numbers.mxfp4(blocks, tensors[name[:-6] + "scales"])
    return result


def banks(quantise):
    """ComfyUI's text encoder: experts as modules, no `model.` in front, no head."""

    def make(tensors: File):
        file, plain = {}, {}
        for name, array in tensors.items():
            if not name.endswith(("_blocks", "_scales", "lm_head.weight", "model.norm.weight")):
                file[name.removeprefix("model.").replace("_proj_bias", "_proj.bias")] = plain[name] = array
        for name, bank in dense(tensors).items():
            beside, values = quantise(bank)
            file.update({f"{name.removeprefix('model.')}.{end}": a for end, a in beside.items()})
            plain[name] = values.swapaxes(-1, -2)
        return file, plain

    return make


def mlx_experts(bits, apart=False):
    """MLX: gate and up together as here, or apart as mlx-lm has them."""

    def make(tensors: File):
        file, plain = {}, {n: a for n, a in tensors.items() if not n.endswith(("_blocks", "_scales"))}
        for name, array in plain.items():
            if apart and "gate_up_proj_bias" in name:
                file[name.replace("gate_up_proj_bias", "gate_proj.bias")] = array[..., ::2]
                file[name.replace("gate_up_proj_bias", "up_proj.bias")] = array[..., 1::2]
            else:
                file[name.replace("_proj_bias", "_proj.bias")] = array
        for name, bank in dense(tensors).items():
            plain[name] = np.empty_like(bank.swapaxes(-1, -2))
            both = apart and "gate_up" in name
            names = ("gate_proj", "up_proj") if both else (None,)
            for i, part in enumerate(names):
                beside, values = mlx(bank[:, i :: len(names)], bits)
                plain[name][..., i :: len(names)] = values.swapaxes(-1, -2)
                module = name.replace("gate_up_proj", part) if part else name
                file.update({f"{module}.{end}": a for end, a in beside.items()})
        return file, plain

    return make


def mlx_mxfp4(tensors: File):
    file, plain = {}, {n: a for n, a in tensors.items() if not n.endswith(("_blocks", "_scales"))}
    file.update({name.replace("_proj_bias", "_proj.bias"): array for name, array in plain.items()})
    for name, bank in dense(tensors).items():
        blocks = tensors[f"{name}_blocks"]
        file[f"{name}.weight"] = np.ascontiguousarray(blocks).reshape(*blocks.shape[:2], -1).view("<u4")
        file[f"{name}.scales"] = tensors[f"{name}_scales"]
        plain[name] = bank.swapaxes(-1, -2)
    return file, plain


def openai(tensors: File):
    names = {
        "model.embed_tokens.weight": "embedding.weight", "model.norm.weight": "norm.scale",
        "lm_head.weight": "unembedding.weight",
    }  # fmt: skip
    modules = (
        ("input_layernorm.weight", "attn.norm.scale"), ("post_attention_layernorm.weight", "mlp.norm.scale"),
        ("self_attn.sinks", "attn.sinks"), ("self_attn.o_proj", "attn.out"), ("mlp.router", "mlp.gate"),
        ("mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias"), ("mlp.experts.down_proj_bias", "mlp.mlp2_bias"),
        ("mlp.experts.gate_up_proj_", "mlp.mlp1_weight."), ("mlp.experts.down_proj_", "mlp.mlp2_weight."),
    )  # fmt: skip
    file = {}
    for name, array in tensors.items():
        if "q_proj" in name:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            new = name.replace("self_attn.q_proj", "attn.qkv").replace("model.layers", "block")
            file[new] = np.concatenate(parts)
        elif ".k_proj" not in name and ".v_proj" not in name:
            new = names.get(name, name)
            for theirs, ours in modules:
                new = new.replace(theirs, ours)
            file[new.replace("model.layers", "block")] = array
    return file, tensors


put = lambda prefix: whole(lambda name: prefix + name)
mod = lambda name: re.sub(r"(img|txt)_mod\.1\.", r"\1_mod.", name)
fp8 = note("float8_e4m3fn", full_precision_matrix_mult=True)
one = np.ones((), np.float32)
LAYOUTS = {
    "denoiser": {
        "bfloat16": whole(dtype=BF16),
        "float16": whole(dtype=np.float16),
        "prefix `model.diffusion_model.`": put("model.diffusion_model."),
        "prefix `_orig_mod.`": put("_orig_mod."),
        "prefix `module._orig_mod.`": put("module._orig_mod."),
        "`_orig_mod.` within names": whole(lambda name: re.sub(r"(blocks\.\d+\.)", r"\1_orig_mod.", name)),
        "prefix `dit.`": put("dit."),
        "prefix `base_model.model.`": put("base_model.model."),
        "prefix `base_model.model.transformer.`": put("base_model.model.transformer."),
        "q, k and v apart": split_qkv,
        "float8_e4m3fn, cast": whole(dtype=E4M3),
        "float8_e5m2, cast": whole(dtype=E5M2),
        "float8, `scale_weight` and `scaled_fp8`": matrices(
            lambda w: fp8_scaled(w, scale="scale_weight", scale_input=one),
            extra={"scaled_fp8": np.zeros(2, E4M3)}.items(),
        ),
        "float8, `weight_scale` alone": matrices(fp8_scaled),
        "float8, `comfy_quant` and `input_scale`": matrices(lambda w: fp8_scaled(w, said=fp8, input_scale=one)),
        "float8, `_quantization_metadata` in the header": in_header,
        "float8_e5m2, `comfy_quant`": matrices(lambda w: fp8_scaled(w, E5M2, said=note("float8_e5m2"))),
        "float8, a scale a row": matrices(lambda w: fp8_scaled(w, rowwise=True, said=note("float8_e4m3fn_rowwise"))),
        "float8, a scale a block": matrices(fp8_blockwise, 16),
        "int8_tensorwise": matrices(int8),
        "int8_tensorwise, a scale a row": matrices(lambda w: int8(w, rowwise=True)),
        "int8_tensorwise with ConvRot": matrices(lambda w: int8(w, convrot=16, rowwise=True), 16),
        "MXFP8": matrices(mx_fp8, 32),
        "MXFP8, scales as F8_E8M0": matrices(lambda w: mx_fp8(w, E8M0), 32),
        "MXFP8, scales row by row": matrices(lambda w: mx_fp8(w, rows=True), 32),
        "MXFP8, hybrid with `weight_scalar`": matrices(lambda w: mx_fp8(w, kind="hybrid_mxfp8", weight_scalar=one), 32),
        "NVFP4": matrices(nv_fp4, 16),
        "MLX 4 bits": matrices(lambda w: mlx(w, 4), 64),
        "MLX 8 bits": matrices(lambda w: mlx(w, 8), 64),
        "MLX 4 bits, `img_mod` renamed": matrices(lambda w: mlx(w, 4), 64, mod),
        "MLX 8 bits, `img_mod` renamed": matrices(lambda w: mlx(w, 8), 64, mod),
        "MLX bfloat16, `img_mod` renamed": whole(mod, BF16),
    },
    "text_encoder": {
        "prefix `text_encoders.gpt_oss.transformer.`": put("text_encoders.gpt_oss.transformer."),
        "OpenAI's `original/`": openai,
        "experts as modules, bfloat16": banks(lambda w: ({"weight": w.astype(BF16)}, w.astype(BF16).astype("f4"))),
        "ComfyUI, experts in float8": banks(lambda w: fp8_scaled(w, said=fp8)),
        "ComfyUI, experts in float8, a scale a row": banks(lambda w: fp8_scaled(w, rowwise=True, said=fp8)),
        "ComfyUI, experts in MXFP8": banks(mx_fp8),
        "ComfyUI, experts in int8": banks(int8),
        "ComfyUI, experts in int8 with ConvRot": banks(lambda w: int8(w, convrot=16, rowwise=True)),
        "ComfyUI, experts in NVFP4": banks(nv_fp4),
        "MLX, experts in 4 bits": mlx_experts(4),
        "MLX, experts in 8 bits": mlx_experts(8),
        "MLX, gate and up apart, 8 bits": mlx_experts(8, apart=True),
        "MLX, experts in MXFP4": mlx_mxfp4,
    },
    "autoencoder": {
        "LDM": lambda tensors: to_ldm(tensors, outer=False, last=False),
        "LDM, `quant_conv` outside": lambda tensors: to_ldm(tensors, outer=True, last=False),
        "LDM, convolutions [out, height, width, in]": lambda tensors: to_ldm(tensors, outer=True, last=True),
        "MLX bfloat16, convolutions [out, height, width, in]": ohwi,
        "prefix `first_stage_model.`": put("first_stage_model."),
    },
}
CASES = [(network, layout) for network, layouts in LAYOUTS.items() for layout in layouts]


def save(path, tensors: File, metadata=None) -> None:
    start, order = writer.header(specs_of(tensors), {"format": "pt", **(metadata or {})})
    path.write_bytes(start + b"".join(np.ascontiguousarray(tensors[name]).tobytes() for name in order))


def error(actual: dict, expected: dict) -> float:
    as_float = lambda a: np.asarray(a, np.float64).reshape(-1)
    pairs = [(as_float(actual[name]), as_float(expected[name])) for name in expected]
    return float(np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)))


def measure(release, network: str, layout: str, place) -> tuple[float, float]:
    """(error of reading, error of the layout)."""
    tensors = release[FOLDERS[network]]
    file, plain, *metadata = LAYOUTS[network][layout](tensors)
    save(place, file, *metadata)
    found = source.find(place).parts[network].tensors
    assert set(found) == set(plain)
    assert all(found[name].shape == plain[name].shape for name in plain)
    original = {n: a for n, a in tensors.items() if n in plain}
    if network == "text_encoder" and "model.layers.0.mlp.experts.down_proj" in plain:
        original.update({name: bank.swapaxes(-1, -2) for name, bank in dense(tensors).items()})
    return error(dict(found), plain), error(plain, original)


def row(network: str, layout: str, reading: float, loss: float) -> str:
    shown = lambda e: "0" if e == 0 else "< 1e-6" if e < 1e-6 else f"{100 * e:.2g} %"
    return f"| {network.replace('_', ' ')} | {layout} | {shown(reading)} | {shown(loss)} |"


@pytest.mark.parametrize(("network", "layout"), CASES, ids=lambda value: value)
def test_a_layout_is_read_as_it_stands(release, tmp_path, network, layout):
    reading, loss = measure(release, network, layout, tmp_path / "x.safetensors")
    # int8 with ConvRot is multiplied back in float32; all else is a product or two of float32.
    assert reading < 1e-6
    line = row(network, layout, reading, loss)
    assert line in DOC.read_text(encoding="utf-8"), f"docs/checkpoints.md lacks: {line}"


def test_the_table_has_no_other_rows():
    found = [
        line
        for line in DOC.read_text(encoding="utf-8").splitlines()
        if re.match(r"\| (denoiser|text enc|autoenc)", line)
    ]
    assert len(found) == len(CASES)


ENDS = ("weight_scale", "scale_weight", "weight_scale_2", "scales")
LOST = tuple(f"0.{part}.{end}" for part in ("txt_mlp.w2", "mlp.experts.down_proj", "mlp.mlp2_weight") for end in ENDS)
HOSTILE = {
    # Were all lost, float8 would be plain numbers.
    "a scale lost": lambda name, a: None if name.endswith(LOST) else a,
    "scales cut": lambda name, a: a[..., :-1] if name.endswith(("weight_scale", ".scales")) and a.ndim > 1 else a,
    "scales of another type": lambda name, a: a.astype(np.int32) if name.endswith(("_scale", ".scales")) else a,
    "an unknown format": lambda name, a: note("float7") if name.endswith("comfy_quant") else a,
    "an unknown word": lambda name, a: note("mxfp8", layout="rows") if name.endswith("comfy_quant") else a,
}


@pytest.mark.parametrize("change", HOSTILE)
def test_hostile_variants_are_refused(release, tmp_path, change):
    """Of every quantised layout, where the change touches it: one short line."""
    touched = 0
    for network, layout in CASES:
        file, _, *metadata = LAYOUTS[network][layout](release[FOLDERS[network]])
        bad = {name: HOSTILE[change](name, array) for name, array in file.items()}
        if all(bad[name] is file[name] for name in file):
            continue
        touched += 1
        save(tmp_path / "x.safetensors", {name: a for name, a in bad.items() if a is not None}, *metadata)
        with pytest.raises(LensError) as refused:
            source.find(tmp_path / "x.safetensors")
        assert len(str(refused.value).splitlines()) == 1
        assert len(str(refused.value)) < 700, (layout, str(refused.value))
    assert touched >= 8


def test_openais_own_config_is_read(goldens):
    values = folder.read_json(goldens / "tiny_release" / "text_encoder" / "config.json")
    rope = values["rope_parameters"]
    own = {
        "num_hidden_layers": values["num_hidden_layers"], "num_experts": values["num_local_experts"],
        "experts_per_token": values["num_experts_per_tok"], "rope_theta": rope["rope_theta"],
        "rope_scaling_factor": rope["factor"], "rope_ntk_alpha": rope["beta_slow"], "rope_ntk_beta": rope["beta_fast"],
        "initial_context_length": rope["original_max_position_embeddings"],
        **{key: values[key] for key in (
            "vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads",
            "sliding_window",
        )},
    }  # fmt: skip
    read = lambda v: gpt_oss.config_from_release(gpt_oss.from_openai(v), "config.json")
    assert read(own) == dataclasses.replace(read(values), param_dtype="bfloat16")
    assert gpt_oss.from_openai(values) is values
    for key in own:
        with pytest.raises(LensError):
            read({**own, key: "many"})


def test_damaged_files_are_read_or_refused(release, tmp_path):
    """Tensors lost, renamed, misshapen or of another type, in every layout: one line, or numbers."""
    rng, messages = random.Random(0), []
    for network, layout in CASES:
        file, _, *metadata = LAYOUTS[network][layout](release[FOLDERS[network]])
        for change in range(4):
            damaged = dict(file)
            quantised = [n for n in file if n.endswith(("weight", "scale", "scales", "biases", "quant", "scale_2"))]
            name, other = rng.sample(quantised, 2)
            if change == 0:
                damaged[other] = damaged.pop(name)
            elif change == 1:
                damaged[name] = damaged[name].reshape(rng.choice(((-1,), (1, -1), (-1, 1, 1), (1, 1, 1, -1))))
            elif change == 2:
                damaged[name] = damaged[name].reshape(-1)[:1].reshape(())
            else:
                kind = rng.choice((np.uint8, np.int8, np.uint32, np.float32, np.int64))
                damaged[name] = np.zeros(damaged[name].shape, kind)
            save(tmp_path / "x.safetensors", damaged, *metadata)
            try:
                found = source.find(tmp_path / "x.safetensors").parts[network].tensors
                assert all(found[name].shape == spec.shape for name, spec in found.specs.items())
            except LensError as error:
                messages.append(str(error))
    assert len(messages) >= 150
    assert all(len(message.splitlines()) == 1 for message in messages)
