"""The update rule: what is decayed, how the rate runs, and that the clip binds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lens_jax.errors import LensError
from lens_jax.models import denoiser
from lens_jax.run.optimizer import OptimizerConfig, decay_mask, learning_rate_schedule, make_optimizer


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
