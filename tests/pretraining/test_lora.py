"""Fine-tuning by an adapter: the same loop, and of its base neither a gradient nor a copy in a checkpoint."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lens_jax import config as config_files
from lens_jax.errors import LensError
from lens_jax.models import lora
from lens_jax.models.lora import LoraConfig
from lens_jax.pretraining import warm_start
from lens_jax.pretraining.job import train
from lens_jax.pretraining.loss import networks, validation_loss
from lens_jax.pretraining.recipe import create_state
from lens_jax.run import store
from lens_jax.run.config import CheckpointConfig
from lens_jax.run.log import read_metrics
from lens_jax.run.state import to_parts
from lens_jax.run.store import Store

ADAPTER = LoraConfig(rank=4, alpha=8, targets=("attention", "mlp"), dropout=0.1)


@pytest.fixture(scope="module")
def base(tiny_config, tmp_path_factory):
    """A run to start from, of random numbers: a fresh one's ways out are zero."""
    out = tmp_path_factory.mktemp("base") / "run"
    codec = {"basis": np.eye(48, dtype=np.float32), "mean": np.full(48, 0.1, np.float32), "scale": np.float32([0.9])}
    state = jax.jit(functools.partial(create_state, tiny_config))(codec)
    leaves, tree = jax.tree.flatten(state.ema)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    ema = tree.unflatten([x + 0.02 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)])
    state = state.replace(ema=ema)
    saved = Store(out / "checkpoints", CheckpointConfig())
    meta = {"kind": "pretraining", "config": config_files.to_dict(tiny_config), "position": {}, "sizes": [[16, 16]]}
    saved.save(0, to_parts(state), meta)
    saved.close()
    return state, out


@pytest.fixture(scope="module")
def config(tiny_config, base):
    samples = dataclasses.replace(tiny_config.samples, every=0)
    optimizer = dataclasses.replace(tiny_config.optimizer, learning_rate=1e-2)
    changes = {"init_from": str(base[1]), "lora": ADAPTER, "accumulation": 1, "samples": samples}
    return dataclasses.replace(tiny_config, optimizer=optimizer, **changes)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "run"
    return train(dataclasses.replace(config, out=str(out))).state, out


def bits(state) -> dict[str, np.ndarray]:
    raw = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return {
        jax.tree_util.keystr(path): np.asarray(raw(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def test_only_the_adapter_is_trained(base, trained, config):
    state, _ = trained
    assert set(state.params) == set(state.ema) == {"lora"}
    frozen, average = flatten_dict(state.frozen["denoiser"], sep="/"), flatten_dict(base[0].ema["denoiser"], sep="/")
    for path, leaf in frozen.items():
        np.testing.assert_array_equal(leaf, average[path], err_msg=path)
    for leaf in jax.tree.leaves((state.params, state.ema)):
        assert leaf.dtype == jnp.float32
        assert np.abs(leaf).max() > 0
    # Two moments of the adapter and the counter.
    adapter = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == 2 * adapter + 1
    # The statistics of the codec are those of the base.
    np.testing.assert_array_equal(state.frozen["codec"]["mean"], base[0].frozen["codec"]["mean"])


def test_the_base_is_kept_in_what_it_is_computed_in(base, config):
    """Half of float32's memory, and bit for bit what a step would round it to."""
    half = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    loaded, _ = warm_start.load(half)
    average = flatten_dict(base[0].ema["denoiser"], sep="/")
    for path, leaf in loaded.items():
        np.testing.assert_array_equal(leaf, average[path].astype(jnp.bfloat16), err_msg=path)
    state = jax.eval_shape(functools.partial(create_state, half), {})
    dtypes = lambda tree: {leaf.dtype for leaf in jax.tree.leaves(tree) if leaf.ndim}
    assert dtypes(state.frozen["denoiser"]) == {jnp.dtype("bfloat16")}
    assert dtypes((state.params, state.ema, state.opt_state)) == {jnp.dtype("float32")}


def test_the_loss_falls(trained, config):
    state, _ = trained
    model = dataclasses.replace(config.model, dtype="float32")
    rng = np.random.default_rng(0)
    records = read_metrics(trained[1] / "metrics.jsonl", "validation")
    assert [record["step"] for record in records] == [4, 8]
    # The same held-out data at the same noise.
    assert records[1]["loss"] < records[0]["loss"]
    # What is measured is what the merged model has.
    batch = {
        "latents": rng.standard_normal((4, 16, 48), np.float32),
        "text": (rng.standard_normal((4, 3, 512), np.float32),),
        "text_lengths": np.full(4, 3, np.int32),
        "positions": np.zeros((19, 3), np.int32),
        "weight": np.ones(4, np.float32),
    }
    params, adapter = networks(config.lora, state.params, state.frozen)
    merged = {"denoiser": lora.merged(jax.tree.map(lambda x: x.astype(jnp.float32), params), adapter)}
    key = jax.random.key(0)
    plain, _ = jax.jit(lambda p: validation_loss(model, config.flow, lora.OFF, p, {}, batch, key))(merged)
    applied, _ = jax.jit(
        lambda p, f: validation_loss(model, config.flow, config.lora, p, f, batch, key)
    )(state.params, state.frozen)  # fmt: skip
    np.testing.assert_allclose(applied, plain, rtol=1e-5)


def test_a_checkpoint_leaves_the_base_out(trained):
    shapes = store.saved_shapes(store.find(trained[1]))
    assert {path.partition("/")[0] for path in shapes} >= {"params", "ema", "frozen", "opt_state", "extra"}
    assert not [path for path in shapes if "denoiser" in path]


@pytest.mark.slow
def test_stopped_and_gone_on_is_bit_identical(trained, config, tmp_path):
    """With dropout on: what is left out follows from the step alone."""
    half = dataclasses.replace(config, out=str(tmp_path / "run"))
    train(dataclasses.replace(half, steps=4))
    state = train(half).state
    expected = bits(trained[0])
    found = bits(state)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_another_base_is_refused(base, trained, config, tmp_path):
    out = dataclasses.replace(config, out=str(trained[1]), steps=12)
    with pytest.raises(LensError, match=r"not the parameters that the run in .* began with"):
        train(dataclasses.replace(out, init_part="params"))
    with pytest.raises(LensError, match=r"init_from .*: a run that trained an adapter, and holds no denoiser"):
        train(dataclasses.replace(config, out=str(tmp_path / "run"), init_from=str(trained[1])))
    with pytest.raises(LensError, match=r"lora\.rank is 4, but init_from names nothing"):
        train(dataclasses.replace(config, out=str(tmp_path / "run"), init_from=""))
    with pytest.raises(LensError, match="init_partial is not for an adapter"):
        train(dataclasses.replace(config, out=str(tmp_path / "run"), init_partial=True))
    assert not (tmp_path / "run").exists()


def test_a_base_is_told_by_its_numbers_whatever_their_order(base):
    tree = base[0].ema["denoiser"]
    back = {name: tree[name] for name in reversed(tree)}
    assert int(warm_start.checksum(tree, None)) == int(warm_start.checksum(back, None))
    other = {**tree, "image_out": jax.tree.map(lambda x: x + 1, tree["image_out"])}
    assert int(warm_start.checksum(tree, None)) != int(warm_start.checksum(other, None))


def test_the_config_of_a_run_says_its_adapter(trained):
    values = json.loads((trained[1] / "config.json").read_text())
    assert values["lora"] == {
        "kind": "LoraConfig", "rank": 4, "alpha": 8.0, "targets": ["attention", "mlp"], "dropout": 0.1,
    }  # fmt: skip
