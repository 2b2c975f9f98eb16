"""A new run from a run, a release, its conversion or a file: just those parameters, or every name that does not fit."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lens_jax import config as config_files
from lens_jax import parallel
from lens_jax.convert import denoiser as release_denoiser
from lens_jax.convert import native, packed, source, writer
from lens_jax.encoders.linear import LinearCodecConfig
from lens_jax.errors import LensError
from lens_jax.models.lora import LoraConfig
from lens_jax.pretraining import warm_start
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.recipe import RULES, create_state
from lens_jax.run.config import CheckpointConfig
from lens_jax.run.state import to_parts
from lens_jax.run.store import Store


@pytest.fixture(scope="module")
def release(goldens) -> Path:
    return goldens / "tiny_release"


@pytest.fixture(scope="module")
def config(release) -> TrainConfig:
    """Of the size of the small release."""
    model = release_denoiser.read_config(release / "transformer" / "config.json", dtype="float32")
    return TrainConfig(model=model, codec=LinearCodecConfig(patch=4, components=48))


def new_state(config: TrainConfig, params=None, seed: int = 0):
    codec = {
        "basis": np.eye(48, dtype=np.float32),
        "mean": np.full(48, 0.25, np.float32),
        "scale": np.ones(1, np.float32),
    }
    create = functools.partial(create_state, dataclasses.replace(config, seed=seed))
    return parallel.create(create, RULES, None, codec, params or {})


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Path:
    """A run whose average is not its parameters."""
    run = tmp_path_factory.mktemp("run")
    state = new_state(config, seed=5)
    state = state.replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    store = Store(run / "checkpoints", CheckpointConfig())
    store.save(0, to_parts(state), {"kind": "pretraining", "config": config_files.to_dict(config), "position": {}})
    store.close()
    return run


def start(config, **changes):
    lines = []
    params, codec = warm_start.load(dataclasses.replace(config, **changes), None, lines.append)
    return params, codec, lines


def assert_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def test_from_a_run(config, run):
    saved = jax.device_get(flatten_dict(new_state(config, seed=5).params["denoiser"], sep="/"))
    params, codec, lines = start(config, init_from=str(run), init_part="params")
    assert_equal(params, saved)
    # Latents must be normalised as they were.
    np.testing.assert_array_equal(codec["mean"], np.full(48, 0.25, np.float32))
    average, _, _ = start(config, init_from=str(run / "checkpoints" / "0"))
    assert_equal(average, {name: value + 1 for name, value in saved.items()})
    assert lines == []
    # What was loaded is all of the new state's parameters, and where its average starts.
    state = new_state(config, params)
    assert_equal(jax.device_get(flatten_dict(state.params["denoiser"], sep="/")), saved)
    assert_equal(jax.device_get(flatten_dict(state.ema["denoiser"], sep="/")), saved)
    assert int(state.step) == 0


@pytest.mark.parametrize("named", [False, True])
def test_from_a_packed_run(config, run, tmp_path, monkeypatch, named):
    """Its average, in the dtype that it was packed in; by its path, and by the name of one that is shipped."""
    saved, codec, _ = start(config, init_from=str(run))
    file = tmp_path / "small" / "base.safetensors"
    tensors = {f"denoiser/{name}": np.asarray(value).astype(ml_dtypes.bfloat16) for name, value in saved.items()}
    tensors |= {f"codec/{name}": np.asarray(value) for name, value in codec.items()}
    file.parent.mkdir()
    writer.write_file(file, tensors, metadata={packed.KEY: json.dumps({"format": packed.FORMAT})})
    (file.parent / "digests.json").write_text(json.dumps({file.name: hashlib.sha256(file.read_bytes()).hexdigest()}))
    monkeypatch.setattr(packed, "SHIPPED", file.parent)
    monkeypatch.chdir(tmp_path / "small")  # where nothing is called "small"
    params, fitted, lines = start(config, init_from="small" if named else str(file))
    assert {value.dtype for value in params.values()} == {np.dtype(np.float32)}
    assert_equal(
        params, {name: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32) for name, x in saved.items()}
    )
    assert_equal(fitted, codec)
    assert lines == []
    adapted = dataclasses.replace(
        config, lora=LoraConfig(rank=2), model=dataclasses.replace(config.model, dtype="bfloat16")
    )
    half, _, _ = start(adapted, init_from=str(file))
    assert {value.dtype for value in half.values()} == {np.dtype(ml_dtypes.bfloat16)}
    # Statistics of another codec are none of this one; and another model is refused.
    other = dataclasses.replace(config, codec=LinearCodecConfig(patch=4, components=24))
    assert start(other, init_from=str(file))[1] is None
    wider = dataclasses.replace(config.model, text_width=config.model.text_width * 2)
    with pytest.raises(LensError, match=r"base.safetensors is of another model; 2 of another shape: text_in/kernel"):
        start(dataclasses.replace(config, model=wider), init_from=str(file))


@pytest.mark.parametrize("kind", ["folder", "file", "conversion"])
def test_from_a_release(config, release, tmp_path, kind):
    found = source.find(release)
    part = found.parts["denoiser"]
    leaves = part.leaves(part.stored_config())
    expected = {name: np.asarray(leaves[name], np.float32) for name in leaves}
    place = release
    if kind == "file":
        (place,) = (release / "transformer").glob("*.safetensors")
    if kind == "conversion":
        place = tmp_path / "ours"
        native.to_jax(found, place, variant="lens")
    params, codec, lines = start(config, init_from=str(place))
    assert_equal(jax.device_get(params), expected)
    assert codec is None
    assert lines == []


def test_every_name_that_does_not_fit(config, run):
    """Wider text features: two arrays have another shape."""
    model = dataclasses.replace(config.model, text_width=config.model.text_width * 2)
    other = dataclasses.replace(config, model=model)
    names = r"text_in/kernel \[\d+, \d+\] for \[\d+, \d+\], text_norm/scale \[\d+, \d+\] for \[\d+, \d+\]"
    with pytest.raises(
        LensError, match=rf"\(ema\) is of another model; 2 of another shape: {names}. Take what fits with"
    ):
        start(other, init_from=str(run))
    params, _, lines = start(other, init_from=str(run), init_partial=True)
    assert len(lines) == 1
    assert "2 of another shape: text_in/kernel" in lines[0]
    loaded = jax.device_get(params)
    fresh, state = new_state(other), new_state(other, params)
    fresh, state = (jax.device_get(flatten_dict(x.params["denoiser"], sep="/")) for x in (fresh, state))
    assert loaded.keys() == fresh.keys() - {"text_in/kernel", "text_norm/scale"}
    for name in ("text_in/kernel", "text_norm/scale"):
        np.testing.assert_array_equal(state[name], fresh[name])
    assert_equal({name: state[name] for name in loaded}, loaded)


def test_missing_and_over(config, run):
    wanted = {"image_in/bias": jax.ShapeDtypeStruct((3,), "float32"), "new": jax.ShapeDtypeStruct((3,), "float32")}
    found = {"image_in/bias": (3,), "old": (2,)}
    with pytest.raises(LensError, match=r"x is of another model; 1 missing: new; 1 over: old. Take"):
        warm_start._choose("x", config, wanted, found, print)


def test_bad_places(config, tmp_path):
    with pytest.raises(LensError, match="no such file or folder"):
        start(config, init_from=str(tmp_path / "none"))
    with pytest.raises(LensError):
        start(config, init_from=str(tmp_path))
