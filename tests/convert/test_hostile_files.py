"""Damaged and hostile files: one line that says what is wrong, or the right tensors; never another exception."""

import copy
import json
import random
import shutil
import tracemalloc

import gguf
import numpy as np
import pytest

from lens_jax.convert import autoencoder, denoiser, folder, gpt_oss, quantized, table, writer
from lens_jax.errors import LensError

INDEX = "m.safetensors.index.json"
SHARDS = ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors")
ODD = (-1, 0, 1, 2**31, 2**62, 2**63, 10**30, 1e300, float("nan"), True, None, "", "4", [], [0, 2**62], {}, "F8_E8M0")


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (6, 4), "a.bias": (6,), "b.weight": (5, 6), "b.bias": (5,), "c.scale": ()}
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}


RULES = [table.Rule(name, a.shape, name) for name, a in some_tensors().items()]


@pytest.fixture(autouse=True)
def little_memory():
    """The files here are of a few kilobytes, whatever sizes they claim."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000


@pytest.fixture(scope="module")
def component(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "component"
    writer.write_folder(path, some_tensors(), stem="m", max_shard_bytes=150)
    return path


def load(path) -> None:
    """What every converter does; tensors that are handed over must be the right ones."""
    tensors = folder.open_component(path)
    table.check(RULES, tensors.specs, str(path))
    leaves = dict(table.leaves(RULES, tensors, some_tensors()))
    for name, array in some_tensors().items():
        assert np.array_equal(leaves[name], array)


def refused(run, *arguments) -> bool:
    """Whether it ended in an error of one line; any other exception fails the test."""
    message = ""
    try:
        run(*arguments)
    except LensError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
    return bool(message)


def split(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def mutate_shard(rng: random.Random, content: bytes) -> bytes:
    header, data = split(content)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.sample(names, 2)
    kind = rng.randrange(12)
    if kind == 0:  # a bit of the header or its length
        i = rng.randrange(len(content) - len(data))
        return content[:i] + bytes([content[i] ^ 1 << rng.randrange(8)]) + content[i + 1 :]
    if kind == 1:
        return content[: rng.randrange(len(content))]
    if kind == 2:
        return rng.choice((0, 1, 2**32, 2**63, 2**64 - 1)).to_bytes(8, "little") + content[8:]
    if kind == 3:
        header[name]["data_offsets"] = [rng.choice((*ODD, 0, 4)), rng.choice((*ODD, 24, 96))]
    if kind == 4:
        header[name]["data_offsets"] = header[other]["data_offsets"]
    if kind == 5:
        header[name]["dtype"] = rng.choice(("I32", "U32", "F16", "BF16", "F64", "BOOL", "F8_E4M3", "F4", 3, None, []))
    if kind == 6:
        header[name]["shape"] = rng.choice(([2**62, 2**62, 0], [0], [1] * 64, [2, 3, 4], [4, 6], [-6, -4], *ODD))
    if kind == 7:
        del header[name][rng.choice(("dtype", "shape", "data_offsets"))]
    if kind == 8:
        header[rng.choice((name, "__metadata__", "x" * 1000, "\ud800", "a\nb"))] = rng.choice(ODD)
    if kind == 9:  # a tensor without bytes and with any size
        header["empty"] = {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
    if kind == 10:
        header[other] = copy.deepcopy(header.pop(name))
    if kind == 11:
        deep = b"[" * 200_000
        return join(rng.choice((b"[]", b"null", b"{}", b'{"a":1e999}', b"\xff" * 9, deep, b"1" * 9999)), data)
    return join(header, data)


def mutate_index(rng: random.Random, content: bytes) -> bytes:
    index = json.loads(content)
    name = rng.choice(list(index["weight_map"]))
    kind = rng.randrange(6)
    if kind == 0:
        i = rng.randrange(len(content))
        return content[:i] + bytes([content[i] ^ 1 << rng.randrange(8)]) + content[i + 1 :]
    if kind == 1:
        return content[: rng.randrange(len(content))]
    if kind == 2:
        escapes = (
            "/dev/zero",
            "/dev/stdin",
            "../component/" + SHARDS[0],
            INDEX,
            ".",
            "component",
            "\ud800.safetensors",
        )
        index["weight_map"][name] = rng.choice((*escapes, "a\0.safetensors", "loop.safetensors", *SHARDS, *ODD))
    if kind == 3:
        del index["weight_map"][name]
    if kind == 4:
        index[rng.choice(("weight_map", "metadata"))] = rng.choice(ODD)
    if kind == 5:
        index["weight_map"]["more"] = rng.choice(SHARDS)
    return json.dumps(index).encode()


@pytest.mark.parametrize("seed", range(4))
def test_mutated_shards_and_indices(component, tmp_path, seed):
    rng = random.Random(seed)
    path = tmp_path / "component"
    shutil.copytree(component, path)
    (path / "loop.safetensors").symlink_to("loop.safetensors")
    outcomes = []
    for _ in range(50):
        target = path / rng.choice((*SHARDS, INDEX))
        content = target.read_bytes()
        target.write_bytes((mutate_index if target.name == INDEX else mutate_shard)(rng, content))
        outcomes.append(refused(load, path))
        target.write_bytes(content)
    assert sum(outcomes) >= 20
    load(path)


def test_mutated_configs(goldens):
    rng, outcomes = random.Random(0), []
    for part, convert in (("transformer", denoiser), ("vae", autoencoder), ("text_encoder", gpt_oss)):
        values = folder.read_json(goldens / "tiny_release" / part / "config.json")
        for _ in range(100):
            key = rng.choice(list(values))
            changed = copy.deepcopy(values)
            if rng.random() < 0.2:
                del changed[key]
            elif isinstance(changed[key], list) and rng.random() < 0.5:
                changed[key][rng.randrange(len(changed[key]))] = rng.choice(ODD)
            else:
                changed[key] = rng.choice((*ODD, 10**9, [10**9] * 3, [1] * 10_000, "silu", False))
            outcomes.append(refused(convert.config_from_release, changed, "config.json"))
    assert sum(outcomes) >= 150


# As `some_tensors`, with two that are quantised.
GGUF_RULES = [
    table.Rule(name, shape, name) for name, shape in (("a", (6, 4)), ("b", (5,)), ("q", (3, 64)), ("m", (2, 32)))
]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> tuple[bytes, dict[str, np.ndarray]]:
    """(content, what it stands for)."""
    path, rng = tmp_path_factory.mktemp("hostile") / "m.gguf", np.random.default_rng(0)
    file = gguf.GGUFWriter(path, "lens")
    file.add_token_list(["one", "two"])
    file.add_array("numbers", [1, 2, 3])
    file.add_custom_alignment(32)
    tensors = {rule.name: rng.standard_normal(rule.shape, np.float32) for rule in GGUF_RULES}
    for name, kind in (("q", gguf.GGMLQuantizationType.Q8_0), ("m", gguf.GGMLQuantizationType.MXFP4)):
        data = gguf.quants.quantize(tensors[name], kind)
        tensors[name] = gguf.quants.dequantize(data, kind)
        file.add_tensor(name, data, raw_dtype=kind)
    for name in ("a", "b"):
        file.add_tensor(name, tensors[name])
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path.read_bytes(), tensors


def mutate_gguf(rng: random.Random, content: bytes, header: int) -> bytes:
    """Only the header is changed, so what loads must be right, or of other types and names."""
    i, kind = rng.randrange(header), rng.randrange(4)
    if kind == 0:
        return content[:i] + bytes([content[i] ^ 1 << rng.randrange(8)]) + content[i + 1 :]
    if kind == 1:
        return content[: rng.randrange(len(content))]
    if kind == 2:  # a count, a length, an offset or the middle of one
        size = rng.choice((4, 8))
        value = rng.choice((0, 1, 2, 9, 39, 2**20, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)) % 2 ** (8 * size)
        return content[:i] + value.to_bytes(size, "little") + content[i + size :]
    return content[:i] + content[i + rng.randrange(1, 9) :]


@pytest.mark.parametrize("seed", range(3))
def test_mutated_gguf(gguf_file, tmp_path, seed):
    """A changed header can move a tensor, so only the shapes and types of what loads are checked, and that it loads."""
    content, expected = gguf_file
    path, rng, outcomes = tmp_path / "m.gguf", random.Random(seed), []

    def read() -> dict[str, np.ndarray]:
        tensors = quantized.dequantize(folder.open_component(path), str(path))
        table.check(GGUF_RULES, tensors.specs, str(path))
        return dict(table.leaves(GGUF_RULES, tensors, expected))

    for _ in range(60):
        path.write_bytes(mutate_gguf(rng, content, content.index(expected["a"].tobytes())))
        outcomes.append(refused(read))
    assert sum(outcomes) >= 30
    path.write_bytes(content)
    for name, array in read().items():
        np.testing.assert_array_equal(array, expected[name])


def test_hostile_counts_of_gguf(tmp_path):
    """Each of these keeps the reader of the package busy, or takes all memory."""
    number = lambda value, size=8: value.to_bytes(size, "little")
    start = b"GGUF" + number(3, 4)
    key = number(1) + b"k"
    for body, message in (
        (number(0) + number(1) + key + number(9, 4) + number(0, 4) + number(2**60) + bytes(64), "ends within"),
        (number(0) + number(1) + key + number(9, 4) + number(8, 4) + number(2**60) + bytes(64), "not accepted"),
        (number(0) + number(1) + key + number(9, 4) + number(9, 4) + number(1) + bytes(64), "not accepted"),
        (number(2**62) + number(0) + bytes(64), "claims 4611686018427387904 tensors"),
        (number(0) + number(2**62) + bytes(64), "claims 4611686018427387904 keys"),
        (number(1) + number(0) + number(2**63) + bytes(64), "a name of"),
        (number(1) + number(0) + key + number(9, 4) + bytes(96), "9 axes"),
        (number(1) + number(0) + key + number(2, 4) + number(2**32) * 2 + bytes(96), "ends at byte"),
        (number(1) + number(0) + key + number(1, 4) + number(8) + number(99, 4) + bytes(96), "of type 99; accepted"),
        (number(1) + number(0) + key + number(1, 4) + number(8) + number(8, 4) + bytes(96), "a multiple of 32"),
    ):
        (tmp_path / "m.gguf").write_bytes(start + body)
        with pytest.raises(LensError, match=message):
            folder.open_component(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + number(3 << 24, 4) + bytes(64))
    with pytest.raises(LensError, match="version 50331648; accepted: 2 or 3"):
        folder.open_component(tmp_path / "m.gguf")
