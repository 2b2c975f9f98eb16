"""The update rule: what is decayed, how the rate runs, and that the clip binds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lens_jax.errors import LensError
from lens_jax.models import denoiser
from lens_jax.parallel.rules import path_of
from lens_jax.run.optimizer import OptimizerConfig, decay_mask, each, learning_rate_schedule, make_optimizer


def test_only_matrices_are_decayed(tiny_config):
    """By path: stacked biases and norms are matrices too, and must not be decayed."""
    params = denoiser.abstract_params(tiny_config.model)
    mask = {
        jax.tree_util.keystr(path, simple=True, separator="/"): decayed
        for path, decayed in jax.tree_util.tree_leaves_with_path(decay_mask(params))
    }
    assert mask["blocks/image/qkv/kernel"]
    assert mask["image_in/kernel"]
    assert not mask["blocks/image/qkv/bias"]
    assert not mask["blocks/text/norm1/scale"]
    assert not mask["text_norm/scale"]
    assert {path.split("/")[-1] for path, decayed in mask.items() if decayed} == {"kernel"}


def test_decay_pulls_matrices_and_leaves_norms():
    params = {"a": {"kernel": jnp.ones((2, 3, 4)), "scale": jnp.ones((2, 3))}}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5), steps=10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params, step=0)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.1 * 0.5, rtol=1e-6)
    assert not updates["a"]["scale"].any()


def test_schedules():
    constant = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=4), steps=100)
    np.testing.assert_allclose([constant(i) for i in (0, 2, 4, 99)], [0.2, 0.6, 1, 1], rtol=1e-6)
    cosine = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine"), steps=104)
    np.testing.assert_allclose([cosine(i) for i in (4, 54, 104)], [1, 0.5, 0], atol=1e-6)


def test_clip_binds():
    """Adam is blind to the scale of a gradient, but not to how one step's compares with the others'."""
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0, weight_decay=0), steps=10)
    params = {"a": {"kernel": jnp.ones(4)}}
    state = optimizer.init(params)
    for size in (1.0, 1e6):
        _, state = optimizer.update({"a": {"kernel": jnp.full(4, size)}}, state, params, step=0)
    second_moment = optax.tree.get(state, "nu")["a"]["kernel"]
    # Each clipped gradient has norm 1, so its squares are 1/4: twice that, weighted by 1 - 0.999.
    np.testing.assert_allclose(second_moment, 0.25 * (1 - 0.999**2), rtol=1e-3)


def test_is_the_adamw_of_optax():
    """Only the order of a few roundings differs; a step that is clipped and one that is not, at three rates."""
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=1, schedule="cosine", weight_decay=0.3, clip_norm=2)
    rate = learning_rate_schedule(config, 4)
    adamw = optax.adamw(rate, config.beta1, config.beta2, config.eps, weight_decay=0.3, mask=decay_mask)
    rng = np.random.default_rng(0)
    start = {"a": {"kernel": rng.standard_normal((3, 4), np.float32), "bias": rng.standard_normal(4, np.float32)}}
    ends = []
    for optimizer in (make_optimizer(config, 4), optax.chain(optax.clip_by_global_norm(2), adamw)):
        params, state = start, optimizer.init(start)
        optimizer = optax.with_extra_args_support(optimizer)
        for step, size in enumerate((10, 0.1, 1)):
            updates, state = optimizer.update(optax.tree.scale(size, start), state, params, step=step)
            params = optax.apply_updates(params, updates)
        ends.append(params)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-6), *ends)


def test_bad_values():
    with pytest.raises(LensError, match="must be positive"):
        OptimizerConfig(learning_rate=0)
    with pytest.raises(LensError, match="warmup_steps is -1"):
        OptimizerConfig(warmup_steps=-1)


def test_without_a_first_moment():
    """The updates of Adam, bit for bit, and no memory for a moment that is the gradient itself."""
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, beta1=0.0, beta2=0.9, clip_norm=1e9, weight_decay=0.0)
    params = {"a": {"kernel": jnp.float32([[1.0, -2.0], [0.5, 3.0]])}}
    ours, adam = make_optimizer(config, 9), optax.scale_by_adam(0.0, 0.9, config.eps)
    state, other = ours.init(params), adam.init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) == 4 + 1
    for step in range(3):
        gradients = jax.tree.map(jnp.sin, params)
        updates, state = ours.update(gradients, state, params, step=step)
        expected, other = adam.update(gradients, other)
        np.testing.assert_allclose(updates["a"]["kernel"], -1e-2 * expected["a"]["kernel"], rtol=1e-5)
        params = optax.apply_updates(params, updates)


def test_a_tiny_step_moves_the_masters():
    """5e-7 of a number near one is a few of float32's units, and nothing in bfloat16."""
    config = OptimizerConfig(learning_rate=5e-7, warmup_steps=0, beta1=0.0, beta2=0.9, weight_decay=0.0)
    params = {"a": {"kernel": jnp.linspace(0.5, 1.5, 64).reshape(8, 8)}}
    optimizer = make_optimizer(config, 9)
    gradients = jax.tree.map(jnp.cos, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params, step=0)
    moved = optax.apply_updates(params, updates)["a"]["kernel"]
    np.testing.assert_allclose(params["a"]["kernel"] - moved, 5e-7, atol=1.2e-7)
    assert bool(jnp.all(moved != params["a"]["kernel"]))
    coarse = params["a"]["kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(coarse + updates["a"]["kernel"].astype(jnp.bfloat16), coarse)


def test_a_rule_for_each_tree():
    """Its own rate, clip and moments; the state is laid out by the trees' own names."""
    rate = lambda value: make_optimizer(OptimizerConfig(learning_rate=value, warmup_steps=0, beta1=0.0), 9)
    both = each({"b": rate(1e-3), "a": rate(1e-1)})
    params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
    state = both.init(params)
    updates, after = both.update(params, state, params, step=0)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for name, value in (("a", 1e-1), ("b", 1e-3)):
        one = {name: params[name]}
        alone, _ = rate(value).update(one, rate(value).init(one), one, step=0)
        np.testing.assert_array_equal(updates[name]["kernel"], alone[name]["kernel"])
    paths = [path_of(path) for path, x in jax.tree_util.tree_leaves_with_path(state) if x.ndim]
    assert sorted(paths) == ["a/kernel", "b/kernel"]
