"""The losses through a network: what holds exactly before the first step, with an adapter and without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.diffusion import sde
from lens_jax.models import denoiser, lora
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.layers import joint_positions
from lens_jax.models.lora import LoraConfig
from lens_jax.posttraining.grpo import GrpoConfig
from lens_jax.posttraining.nft import NftConfig
from lens_jax.posttraining.policy import Policy
from lens_jax.posttraining.rl_loss import grpo_loss, nft_loss

MODEL = DenoiserConfig(
    layers=2, heads=2, head_dim=16, rope_axes=(4, 6, 6), latent_channels=8, text_width=12, text_layers=1,
    dtype="float32",
)  # fmt: skip
LORA = LoraConfig(rank=2, alpha=4)


def random(tree, seed: int, size: float = 0.1):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([size * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys)])


def trees(policy: Policy):
    """(params, fixed): a policy that is its own old one, and for an adapter not the reference."""
    base = random(denoiser.abstract_params(policy.model), 0)
    if not policy.lora.rank:
        return {"denoiser": base}, {"old": base, "reference": base}
    adapter = random(lora.abstract(policy.lora, base), 1)
    return {"lora": adapter}, {"denoiser": base, "old": adapter}


def batch(rows: int = 3, padded: int = 0) -> dict:
    rng = np.random.default_rng(0)
    tokens = 6
    latents = rng.standard_normal((2, rows, tokens, 8)).astype(np.float32)
    made = {
        "latents": latents[0],
        "after": latents[1],
        "text": (rng.standard_normal((rows, 3, 12)).astype(np.float32),),
        "text_lengths": np.array([3, 1, 2][:rows], np.int32),
        "positions": joint_positions(2, 3, 3),
        "t": np.array([1.0, 0.7, 0.2], np.float32)[:rows],
        "r": np.array([0.9, 0.5, 0.1], np.float32)[:rows],
        "advantage": np.array([1.5, 0.0, -2.0], np.float32)[:rows],
        "weight": np.ones(rows, np.float32),
        "step": (np.float32(0.7), np.float32(0.5), np.float32(0.6)),
    }
    if padded:
        room = padded - tokens
        pad = lambda x: np.pad(x, ((0, 0), (0, room), (0, 0)))
        made |= {"latents": pad(made["latents"]), "after": pad(made["after"]), "n_image": np.int32(tokens)}
        made["positions"] = np.insert(made["positions"], [tokens] * room, 0, axis=0)
    return made


def value_and_gradient(loss, params, fixed, made):
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return compiled(params, fixed, made, jax.random.key(3))


@pytest.mark.parametrize("lora_", [LORA, pytest.param(LoraConfig(), marks=pytest.mark.slow)], ids=["adapter", "full"])
def test_nft_before_the_first_step(lora_):
    """The old policy is the trained one, so the value does not depend on r; r = 1/2 moves nothing, to the bit."""
    policy = Policy(MODEL, lora_)
    params, fixed = trees(policy)
    loss = functools.partial(nft_loss, policy, NftConfig(kl=0.0), False)
    made = batch()
    same = lambda r: value_and_gradient(loss, params, fixed, {**made, "r": np.full(3, r, np.float32)})
    (low, parts), down = same(0.0)
    (high, _), up = same(1.0)
    np.testing.assert_allclose(low, high, rtol=1e-5)
    assert parts["kl"].tolist() == [0, 3]
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(up))
    for a, b in zip(jax.tree.leaves(down), jax.tree.leaves(up)):
        np.testing.assert_allclose(a, -b, atol=1e-5 * scale)
    _, nothing = same(0.5)
    assert all((x == 0).all() for x in jax.tree.leaves(nothing))
    assert scale > 0


def test_kl_is_to_the_model_without_its_adapter():
    """0 where the adapter adds nothing, else the mean square of what it changes in the velocity."""
    policy = Policy(MODEL, LORA)
    params, fixed = trees(policy)
    loss = functools.partial(nft_loss, policy, NftConfig(), False)
    zero = lora.scaled(params["lora"], 0.0)
    (_, parts), _ = value_and_gradient(loss, {"lora": zero}, {**fixed, "old": zero}, batch())
    assert parts["kl"][0] == 0
    made = batch()
    (_, parts), _ = value_and_gradient(loss, params, fixed, made)
    noise = jax.random.normal(jax.random.key(3), (6, 3, 8)).swapaxes(0, 1)
    x = (1 - made["t"][:, None, None]) * made["latents"] + made["t"][:, None, None] * noise
    inputs = made["text"], made["text_lengths"], made["t"], made["positions"]
    apply = functools.partial(denoiser.apply, MODEL, fixed["denoiser"], x, *inputs)
    change = apply(lora=lora.scaled(params["lora"], 2.0)) - apply()
    np.testing.assert_allclose(parts["kl"][0], np.square(change).mean((1, 2)).sum(), rtol=1e-4)


@pytest.mark.parametrize("algorithm", ["nft", pytest.param("grpo", marks=pytest.mark.slow)])
def test_rows_without_a_reward_and_padding_count_for_nothing(algorithm):
    policy = Policy(MODEL, LORA)
    params, fixed = trees(policy)
    moved = {"lora": lora.scaled(params["lora"], 1.5)}
    loss = (
        functools.partial(nft_loss, policy, NftConfig(), False)
        if algorithm == "nft"
        else functools.partial(grpo_loss, policy, GrpoConfig(clip=1.0), False, 1.0)
    )
    made = batch()
    made["weight"] = np.array([1, 0, 1], np.float32)
    (value, parts), gradient = value_and_gradient(loss, moved, fixed, made)
    other = dict(made)
    for name in ("latents", "after"):
        other[name] = made[name].copy()
        other[name][1] = 3.0
    other |= {name: np.where([False, True, False], 0.4, made[name]) for name in ("r", "advantage")}
    padded = batch(padded=9) | {"weight": made["weight"]}
    for changed in (other, padded):
        (again, _), changed_gradient = value_and_gradient(loss, moved, fixed, changed)
        np.testing.assert_allclose(again, value, rtol=2e-5)
        for a, b in zip(jax.tree.leaves(changed_gradient), jax.tree.leaves(gradient)):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5 * float(jnp.abs(b).max()) + 1e-9)
    assert parts["policy_loss"][1] == 2


@pytest.mark.parametrize("guidance", [1.0, pytest.param(3.0, marks=pytest.mark.slow)])
def test_grpo_ratio_is_one_on_policy(guidance):
    """In float32 exactly; in bfloat16 its logarithm stays below 1e-3. Then KL is the only thing that moves."""
    for dtype, most in (("float32", 0.0), ("bfloat16", 1e-3)):
        policy = Policy(dataclasses.replace(MODEL, dtype=dtype), LORA)
        params, fixed = trees(policy)
        loss = functools.partial(grpo_loss, policy, GrpoConfig(kl=0.0), False, guidance)
        (value, parts), gradient = value_and_gradient(loss, params, fixed, batch())
        assert parts["ratio_deviation"][0] <= 3 * most
        np.testing.assert_allclose(value, 0.5 / 3, atol=3 * most + 1e-6)  # -(1.5 + 0 - 2) / 3
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) > 0


def test_grpo_log_ratio_is_that_of_the_step():
    """Against the Gaussian's density, for a policy that has moved."""
    policy = Policy(MODEL, LORA)
    params, fixed = trees(policy)
    moved = {"lora": lora.scaled(params["lora"], 1.3)}
    made = batch()
    config = GrpoConfig(kl=0.0, clip=10.0)
    (_, parts), _ = value_and_gradient(functools.partial(grpo_loss, policy, config, False, 1.0), moved, fixed, made)
    sigma, following, noise = (float(x) for x in made["step"])
    inputs = made["text"], made["text_lengths"], np.full(3, sigma, np.float32), made["positions"]

    def log_p(tree):
        v = denoiser.apply(MODEL, fixed["denoiser"], made["latents"], *inputs, lora=lora.scaled(tree, 2.0))
        step = sde.Step(*(jnp.float32(x) for x in (sigma, following, noise)))
        mean = np.asarray(sde.mean_after(step, made["latents"], v), np.float64)
        return -np.square(made["after"] - mean).mean((1, 2)) / (2 * noise**2 * (sigma - following))

    ratio = np.exp(log_p(moved["lora"]) - log_p(fixed["old"]))
    np.testing.assert_allclose(parts["ratio_deviation"][0], np.abs(ratio - 1).sum(), rtol=2e-3)


def test_on_policy_without_a_second_forward_pass():
    """Where both are the same, reading the trained policy's as the old one's gives the same loss and gradient."""
    policy = Policy(MODEL, LORA)
    params, fixed = trees(policy)
    for make in (
        lambda shared: functools.partial(nft_loss, policy, NftConfig(), shared),
        lambda shared: functools.partial(grpo_loss, policy, GrpoConfig(), shared, 1.0),
    ):
        (one, _), gradient = value_and_gradient(make(True), params, fixed, batch())
        (two, _), other = value_and_gradient(make(False), params, fixed, batch())
        np.testing.assert_allclose(one, two, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other)):
            np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-9)
