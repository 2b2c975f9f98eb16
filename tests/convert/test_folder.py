"""Components on disk: single files, sharded folders, what is wrong with them; and the writer."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest

from lens_jax.convert import folder, writer
from lens_jax.convert.table import Spec, Tensors
from lens_jax.errors import LensError

INDEX = "m.safetensors.index.json"


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.standard_normal((8, 4), np.float32),
        "a.bias": rng.standard_normal(3, np.float32).astype(ml_dtypes.bfloat16),
        "count": np.array(7, np.int64),
        "a.codes": rng.integers(0, 256, (5, 3), np.uint8),
        "a.fp8": rng.standard_normal(6, np.float32).astype(ml_dtypes.float8_e4m3fn),
        "flag": np.array([True, False]),
        "nothing": np.zeros((0, 4), np.float32),
    }


@pytest.fixture
def sharded(tmp_path):
    path = tmp_path / "component"
    names = writer.write_folder(path, some_tensors(), stem="m", max_shard_bytes=140)
    assert names == ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", INDEX]
    return path


def edit_index(path, change) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def test_a_sharded_folder_is_one_mapping(sharded):
    tensors, expected = folder.open_component(sharded), some_tensors()
    assert set(tensors) == set(expected)
    assert len(tensors) == len(expected)
    for name, array in expected.items():
        assert (tensors.shape(name), tensors.dtype(name)) == (array.shape, array.dtype)
        assert np.array_equal(tensors[name], array)
    assert "stranger" not in tensors
    with pytest.raises(KeyError):
        tensors["stranger"]
    first, _ = tensors["b.weight"], tensors["a.bias"]  # a view stays right when its pages were let go
    assert np.array_equal(first, expected["b.weight"])


def test_index_is_what_diffusers_writes(sharded):
    index = json.loads((sharded / INDEX).read_text())
    expected = some_tensors()
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in expected.values())
    assert list(index["weight_map"]) == sorted(expected)
    assert (sharded / INDEX).read_text() == json.dumps(index, indent=2, sort_keys=True) + "\n"


def test_files_are_those_of_the_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    tensors = some_tensors()
    writer.write_file(tmp_path / "ours.safetensors", tensors)
    theirs = library.save(tensors, {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == theirs
    assert sorted(os.listdir(tmp_path)) == ["ours.safetensors"]


def test_headers_are_aligned_and_deterministic():
    specs = {name: Spec(a.dtype, a.shape) for name, a in some_tensors().items()}
    start, order = writer.header(specs, {"format": "pt"})
    assert len(start) % 8 == 0
    entries = json.loads(start[8:])
    for name in order:
        assert entries[name]["data_offsets"][0] % specs[name].dtype.itemsize == 0
    assert writer.header(dict(reversed(specs.items())), {"format": "pt"})[0] == start
    with pytest.raises(LensError, match="cannot hold z is complex64; accepted: F64"):
        writer.header({"z": Spec(np.dtype(np.complex64), (1,))}, {})


def test_a_tensor_over_the_limit_is_a_shard_of_its_own():
    specs = {name: Spec(np.dtype(np.uint8), (size,)) for name, size in (("a", 6), ("b", 12), ("c", 4), ("d", 1))}
    assert writer.plan_shards(specs, 10) == [["b"], ["a", "c"], ["d"]]
    assert writer.plan_shards({}, 10) == [[]]


def test_a_failed_write_leaves_nothing(tmp_path):
    def read(name):
        if name == "a.bias":
            raise OSError(28, "No space left on device")
        return some_tensors()[name]

    tensors = Tensors({n: Spec(a.dtype, a.shape) for n, a in some_tensors().items()}, read)
    with pytest.raises(LensError, match="cannot be written: No space left"):
        writer.write_folder(tmp_path, tensors, max_shard_bytes=140)
    assert os.listdir(tmp_path) == []


def test_weights_are_not_written_over_others(sharded):
    with pytest.raises(LensError, match="already holds m-00001"):
        writer.write_folder(sharded, some_tensors(), stem="m")


def test_a_single_file_by_folder_or_by_name(tmp_path):
    writer.write_folder(tmp_path, some_tensors(), stem="m")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "._m.safetensors").write_text("left by a file manager")
    for path in (tmp_path, tmp_path / "m.safetensors"):
        assert np.array_equal(folder.open_component(path)["b.weight"], some_tensors()["b.weight"])
    shutil.copy(tmp_path / "m.safetensors", tmp_path / "m.fp16.safetensors")
    with pytest.raises(LensError, match=r"m.fp16.safetensors, m.safetensors: a component has one index, or one file"):
        folder.open_component(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd", "../m-00001-of-00002.safetensors", "..", ".", "", "a/../m-00001-of-00002.safetensors", INDEX,
        "config.json", "C:\\m.safetensors", "m\0.safetensors", "m\n.safetensors", "x" * 400 + ".safetensors",
        "~/m.safetensors", "file:m.safetensors",
    ],
)  # fmt: skip
def test_an_index_names_files_of_its_folder_only(sharded, name):
    edit_index(sharded, lambda weight_map: weight_map.update({"a.bias": name}))
    with pytest.raises(LensError, match="no name of a safetensors file in its folder"):
        folder.open_component(sharded)


def test_links_may_not_leave_the_folder(sharded, tmp_path):
    shard = sharded / "m-00002-of-00002.safetensors"
    outside = tmp_path / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(LensError, match=r"is a link to .*outside.safetensors, outside its folder"):
        folder.open_component(sharded)
    shard.unlink()
    shard.symlink_to(shard.name)
    with pytest.raises(LensError):
        folder.open_component(sharded)
    shard.unlink()
    outside.rename(sharded / "kept.safetensors")
    shard.symlink_to("kept.safetensors")
    assert len(folder.open_component(sharded)) == len(some_tensors())


def test_the_cache_of_the_hub_is_links(sharded, tmp_path):
    snapshot = tmp_path / "models--lens" / "snapshots" / "0a1b" / "component"
    blobs = tmp_path / "models--lens" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / f"{i:064x}")
        (snapshot / file.name).symlink_to(f"../../../blobs/{i:064x}")
    assert len(folder.open_component(snapshot)) == len(some_tensors())


def test_what_is_missing_is_named(sharded, tmp_path):
    (sharded / "m-00002-of-00002.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(LensError, match=r"1 of its 2 files are missing: m-00002-of-00002.safetensors"):
        folder.open_component(sharded)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
    (sharded / "m-00002-of-00002.safetensors").write_text(pointer)
    with pytest.raises(LensError, match=r"Git LFS pointer.*git lfs pull"):
        folder.open_component(sharded)
    with pytest.raises(LensError, match="Git LFS pointer"):
        folder.open_component(sharded / "m-00002-of-00002.safetensors")
    with pytest.raises(LensError, match=r"no .*safetensors and no"):
        folder.open_component(tmp_path)
    with pytest.raises(LensError, match="No such file"):
        folder.open_component(tmp_path / "absent")


def test_index_and_files_must_agree(sharded):
    kept = (sharded / INDEX).read_text()
    edit_index(sharded, lambda weight_map: weight_map.pop("count"))
    with pytest.raises(LensError, match=r"count is in m-0000.*, the index says nothing of it"):
        folder.open_component(sharded)
    (sharded / INDEX).write_text(kept)
    edit_index(sharded, lambda weight_map: weight_map.update({"more": weight_map["count"]}))
    with pytest.raises(LensError, match="more is not in m-0000"):
        folder.open_component(sharded)
    for text in ("[]", "{", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        (sharded / INDEX).write_text(text)
        with pytest.raises(LensError):
            folder.open_component(sharded)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(LensError, match="not a file"):
        folder.open_component(tmp_path)
