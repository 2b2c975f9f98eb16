"""Low-rank adapters: what they add, where they may be, and that a base without one stays what it was."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lens_jax import parallel
from lens_jax.errors import LensError
from lens_jax.models import denoiser, layers, lora
from lens_jax.models.denoiser import LENS, DenoiserConfig
from lens_jax.models.lora import MODULES, LoraConfig

TINY = DenoiserConfig(
    layers=2, heads=2, head_dim=16, latent_channels=8, text_width=12, text_layers=2, rope_axes=(4, 6, 6),
    dtype="float32",
)  # fmt: skip
EVERYTHING = LoraConfig(rank=3, targets=("*",))


def random(tree, key, size=0.5):
    """Every leaf non-trivial, in its own dtype."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([(size * jax.random.normal(k, x.shape)).astype(x.dtype) for k, x in zip(keys, leaves)])


@pytest.fixture(scope="module")
def base():
    return random(denoiser.abstract_params(TINY), jax.random.key(1))


@pytest.fixture(scope="module")
def adapter(base):
    return random(lora.abstract(EVERYTHING, base), jax.random.key(2), 0.3)


def inputs():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((3, 12, 8), np.float32)
    text = tuple(rng.standard_normal((3, 5, 12), np.float32) for _ in range(2))
    t = np.linspace(0.1, 0.9, 3, dtype=np.float32)
    return latents, text, np.array([5, 2, 0], np.int32), t, layers.joint_positions(3, 4, 5)


def error(actual, expected) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("options", [{}, {"unroll": True}, {"remat": "full"}], ids=["scan", "unroll", "remat"])
def test_applied_is_merged(base, adapter, options):
    """In every layer that can have one: y = W x + B A x is (W + B A) x."""
    config = dataclasses.replace(TINY, **options)
    assert set(flatten_dict(adapter, sep="/")) == {f"{path}/{name}" for path in MODULES for name in "ab"}
    run = jax.jit(functools.partial(denoiser.apply, config))
    applied = run(base, *inputs(), lora=lora.scaled(adapter, 0.5))
    merged = run(lora.merged(base, lora.scaled(adapter, 0.5)), *inputs())
    # Only the order of float32 sums differs.
    assert error(applied, merged) < 2e-5
    assert error(applied, run(base, *inputs())) > 0.1


@pytest.mark.slow
def test_applied_in_bfloat16_is_merged(base, adapter):
    config = dataclasses.replace(TINY, dtype="bfloat16", param_dtype="bfloat16")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    small = lora.scaled(adapter, 0.1)
    exact = jax.jit(functools.partial(denoiser.apply, TINY))
    run = jax.jit(functools.partial(denoiser.apply, config))
    wanted = exact(lora.merged(base, small), *inputs())
    # bfloat16 has 8 bits, 0.4 % a rounding: about as far as the same network without an adapter.
    far = error(run(half, *inputs()), exact(base, *inputs()))
    assert error(run(half, *inputs(), lora=small), wanted) < 2 * far
    assert error(run(lora.merged(half, small), *inputs()), wanted) < 2 * far


def test_a_fresh_adapter_changes_no_bit(base):
    fresh = lora.init(EVERYTHING, base, jax.random.key(0))
    run = jax.jit(functools.partial(denoiser.apply, TINY))
    assert np.array_equal(run(base, *inputs(), lora=fresh), run(base, *inputs()))
    bound = TINY.width**-0.5
    drawn = np.asarray(fresh["blocks"]["image"]["out"]["a"])
    # As PEFT draws it, by all inputs of the layer: heads x head_dim here.
    assert 0.9 * bound < np.abs(drawn).max() <= bound


def test_several_are_one_of_their_ranks(base, adapter):
    other = random(lora.abstract(LoraConfig(rank=2, targets=("img_qkv", "mlp")), base), jax.random.key(3), 0.3)
    both = lora.joined([lora.scaled(adapter, 0.7), lora.scaled(other, -0.2)])
    assert lora.rank_of(both) == 5
    one_by_one = lora.merged(lora.merged(base, lora.scaled(adapter, 0.7)), lora.scaled(other, -0.2))
    for path, leaf in flatten_dict(lora.merged(base, both), sep="/").items():
        np.testing.assert_allclose(leaf, flatten_dict(one_by_one, sep="/")[path], atol=1e-6)


def test_gradients_are_of_the_adapter_alone(base, adapter):
    """Against the chain rule by hand: with G of the merged kernel, those of A and B are G Bᵀ and Aᵀ G."""
    loss = lambda params, tree: jnp.mean(denoiser.apply(TINY, params, *inputs(), lora=tree) ** 2)
    found = flatten_dict(jax.jit(jax.grad(loss, 1))(base, adapter), sep="/")
    whole = flatten_dict(jax.jit(jax.grad(loss))(lora.merged(base, adapter), None), sep="/")
    flat = flatten_dict(adapter, sep="/")
    cases = {
        "blocks/image/qkv": ("lwphd,lrphd->lwr", "lwr,lwphd->lrphd"),
        "blocks/text/out": ("lhdw,lrw->lhdr", "lhdr,lhdw->lrw"),
        "blocks/image/gate_up": ("lwph,lprh->lwpr", "lwpr,lwph->lprh"),
        "blocks/image/modulation": ("lwo,lro->lwr", "lwr,lwo->lro"),
        "image_out": ("wc,rc->wr", "wr,wc->rc"),
    }
    for path, (of_a, of_b) in cases.items():
        kernel, a, b = whole[f"{path}/kernel"], flat[f"{path}/a"], flat[f"{path}/b"]
        assert error(found[f"{path}/a"], jnp.einsum(of_a, kernel, b)) < 1e-4
        assert error(found[f"{path}/b"], jnp.einsum(of_b, a, kernel)) < 1e-4


def test_a_step_computes_no_gradient_of_the_base():
    """Counted in the compiled program: two thirds of the products of a full one, and those of the adapter."""
    config = LoraConfig(rank=1, targets=("attention", "mlp"))
    params = denoiser.abstract_params(TINY)
    loss = lambda params, tree: jnp.mean(denoiser.apply(TINY, params, *inputs(), lora=tree) ** 2)

    def operations(gradient, *args) -> float:
        return jax.jit(gradient).lower(*args).compile().cost_analysis()["flops"]

    # Unrolled: of a loop the compiler counts one turn.
    forward = operations(loss, params, None)
    full = operations(jax.grad(loss), params, None) - forward
    ours = operations(jax.grad(loss, 1), params, lora.abstract(config, params)) - forward
    assert ours < 0.75 * full


@pytest.mark.slow
def test_dropout_leaves_out_inputs_of_the_adapter_alone(base, adapter):
    run = jax.jit(functools.partial(denoiser.apply, TINY))
    drop = lambda seed: lora.Dropout(0.5, jax.random.key(seed))
    plain = run(base, *inputs())
    zeros = jax.tree.map(jnp.zeros_like, adapter)
    assert np.array_equal(run(base, *inputs(), lora=zeros, lora_dropout=drop(0)), plain)
    first, again, other = (run(base, *inputs(), lora=adapter, lora_dropout=drop(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert error(first, other) > 0.01
    # What is left is larger for it: of many draws the mean of one layer's change is the change.
    one = lora.Adapters({"image_out": adapter["image_out"]}, drop(0))
    module = lambda x, **options: jnp.zeros((*x.shape[:-1], 8))
    holder = dataclasses.make_dataclass("Holder", ["image_out"])(module)
    x = jnp.ones((1, 200_000, TINY.width))
    mean = one(holder, "image_out", x).mean((0, 1))
    exact = (x[0, :1] @ adapter["image_out"]["a"] @ adapter["image_out"]["b"])[0]
    np.testing.assert_allclose(mean, exact, atol=0.02)


def test_size_of_the_report():
    """Rank 64 at the released size: 56.6M parameters on attention, 160.4M with the MLPs (methods of the issue)."""
    params = denoiser.abstract_params(LENS)
    count = lambda *targets: lora.parameter_count(LoraConfig(rank=64, targets=targets), params)
    assert count("attention") == 48 * 2 * 64 * (1536 + 4608 + 1536 + 1536) == 56_623_104
    assert count("attention", "mlp") == 56_623_104 + 48 * 2 * 3 * 64 * (1536 + 4096) == 160_432_128
    assert count("attention", "mlp") < 0.05 * denoiser.parameter_count(LENS)


def test_targets_are_modules_of_the_release_by_pattern():
    assert lora.paths_of(("attention",)) == lora.paths_of(("img_qkv", "attn.txt_qkv", "to_out.0", "to_add_out"))
    assert lora.paths_of(("img_*",)) == [
        "blocks/image/qkv", "blocks/image/gate_up", "blocks/image/down", "blocks/image/modulation", "image_in",
    ]  # fmt: skip
    with pytest.raises(LensError, match=r"'img_qvk' \(did you mean 'img_mlp|'img_qvk' .*attn.img_qkv"):
        LoraConfig(rank=4, targets=("img_qvk",))
    with pytest.raises(LensError, match=r"img_mlp.w1 alone; img_mlp.w1 and img_mlp.w3 are one layer"):
        LoraConfig(rank=4, targets=("img_mlp.w1",))
    with pytest.raises(LensError, match=r"lora\.targets is empty"):
        LoraConfig(rank=4, targets=())
    assert LoraConfig(rank=64, alpha=128).scale == 2
    assert LoraConfig(rank=64).scale == 1


def test_every_leaf_has_a_rule():
    """Strictly, as beside the kernel: an axis is cut as it is there, and the rank is whole."""
    mesh = jax.sharding.AbstractMesh((1, 8, 4, 1), ("data", "fsdp", "tensor", "sequence"))
    params = denoiser.abstract_params(LENS)
    kernels = flatten_dict(params, sep="/")
    for path, leaf in flatten_dict(lora.abstract(LoraConfig(rank=3, targets=("*",)), params), sep="/").items():
        spec = parallel.spec_of(parallel.LORA_RULES, path, leaf.shape, mesh)
        layer, _, name = path.rpartition("/")
        kernel = kernels[f"{layer}/kernel"].shape
        cut = parallel.spec_of(parallel.DENOISER_RULES, f"{layer}/kernel", kernel, mesh)
        # A has the first axes of the kernel and B the last; q/k/v and gate/up have theirs in both.
        rest = [axis for i, axis in enumerate(spec) if i != lora.rank_axis(path) % leaf.ndim]
        rest = rest[1:] if name == "b" and path.startswith("blocks/") else rest
        assert rest == list(cut[: len(rest)] if name == "a" else cut[len(cut) - len(rest) :]), path
        assert spec[lora.rank_axis(path)] is None
    with pytest.raises(LensError, match="no sharding rule"):
        parallel.spec_of(parallel.LORA_RULES, "blocks/image/qkv/c", (2, 3), mesh)
