"""The terms of distillation on velocities that are known: where they move samples, and where they do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.diffusion import sampler
from lens_jax.models import denoiser
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.layers import joint_positions
from lens_jax.posttraining import distill_discriminator as heads
from lens_jax.posttraining import distill_generate as generator
from lens_jax.posttraining import distill_losses as losses
from lens_jax.posttraining import distill_noise as noise
from lens_jax.posttraining.distill_config import (
    DiscriminatorConfig,
    DistillConfig,
    FakeConfig,
    GeneratorConfig,
    MatchingConfig,
)
from lens_jax.posttraining.distill_warm_start import path

KEY = jax.random.key(3)


def towards(point: float):
    """The velocity of a distribution that is one point: (x - point) / sigma, whatever x is."""
    return lambda x, t: (x - point) / t[:, None, None]


def samples(rows: int = 64) -> jax.Array:
    """[rows, 2, 3]."""
    return jax.random.normal(jax.random.key(0), (rows, 2, 3))


def gradient(config: MatchingConfig, scores: losses.Scores, clean, judge=None, gan=0.0) -> np.ndarray:
    """Of the loss of each sample, times the numbers that it is a mean of."""
    sigma = jnp.full(len(clean), 0.9)
    total = lambda x: jnp.sum(losses.student_loss(config, gan, scores, judge, x, sigma, KEY)[0])
    return np.asarray(jax.grad(total)(clean)) * clean[0].size


def test_where_samples_are_moved():
    clean = samples()
    agreed = losses.Scores(fake=towards(1.0), teacher=towards(1.0), uncaptioned=towards(-1.0))
    plain, guided = MatchingConfig(weight=1.0, guidance_scale=1.0), MatchingConfig(weight=1.0, guidance_scale=3.0)
    # Fake score and teacher agree and nothing is guided: nothing moves.
    assert np.abs(gradient(plain, agreed, clean)).max() == 0
    # Guidance moves against the gradient, towards what the caption predicts (1) and away from what none does (-1), by
    # g - 1 times their distance over the sample's mean distance to the former.
    distance = np.abs(clean - 1).mean((1, 2), keepdims=True)
    np.testing.assert_allclose(gradient(guided, agreed, clean), np.broadcast_to(-2 * 2 / distance, clean.shape), 1e-4)
    # Where the fake score sees samples at 0 and the teacher at 1, they move to 1.
    apart = agreed._replace(fake=towards(0.0))
    np.testing.assert_allclose(gradient(plain, apart, clean), np.broadcast_to(-1 / distance, clean.shape), 1e-4)
    # Both, and their weight.
    both = gradient(MatchingConfig(weight=0.1, guidance_scale=3.0), apart, clean)
    np.testing.assert_allclose(both, np.broadcast_to(-0.1 * 5 / distance, clean.shape), 1e-4)


def test_said_of_a_step():
    clean = samples()
    scores = losses.Scores(fake=towards(0.0), teacher=towards(1.0), uncaptioned=towards(-1.0))
    config = MatchingConfig(weight=1.0, guidance_scale=3.0)
    _, said = losses.student_loss(config, 0.0, scores, None, clean, jnp.full(len(clean), 0.9), KEY)
    np.testing.assert_allclose(said["dm_ca_cosine"], 1, rtol=1e-4)
    np.testing.assert_allclose(said["ca_over_dm"], 4, rtol=1e-4)
    np.testing.assert_allclose(said["dm_size"], 1, rtol=1e-4)
    np.testing.assert_allclose(said["ca_size"], 4, rtol=1e-4)
    assert {"fake_error", "teacher_error", "sample_mean", "sample_std"} < said.keys()


def test_padding_moves_nothing_else():
    """Tokens behind n_image change neither loss nor gradient of the others."""
    scores = losses.Scores(fake=towards(0.0), teacher=towards(1.0), uncaptioned=towards(-1.0))
    clean, sigma = samples(), jnp.full(64, 0.9)
    config = MatchingConfig(guidance_scale=3.0)
    total = lambda x, n: jnp.sum(losses.student_loss(config, 0.0, scores, None, x, sigma, KEY, n)[0])
    padded = jnp.pad(clean, ((0, 0), (0, 3), (0, 0)), constant_values=7.0)
    np.testing.assert_allclose(total(padded, jnp.int32(2)), total(clean, None), rtol=1e-6)
    found = jax.grad(total)(padded, jnp.int32(2))
    np.testing.assert_allclose(found[:, :2], jax.grad(total)(clean, None), rtol=1e-5, atol=1e-9)
    assert np.abs(found[:, 2:]).max() == 0


def test_discriminator_in_the_students_loss():
    """One pass gives velocity and logits; its gradient is that of the loss written out."""
    clean = samples()
    scores = losses.Scores(fake=towards(1.0), teacher=None, uncaptioned=None)
    judge = lambda x, t: (towards(1.0)(x, t), jnp.sum(jnp.sin(x), (1, 2)) * t)
    config = MatchingConfig(guidance_scale=1.0)
    seen = []

    def recording(x, t):
        seen.append((x, t))
        return judge(x, t)

    def written_out(x):
        _, key_noise, *_ = jax.random.split(KEY, 4)
        t = noise.dm_sigmas(config, jax.random.split(KEY, 4)[0], len(x))
        fresh = jax.random.normal(key_noise, (2, 64, 3)).swapaxes(0, 1)
        noisy = (1 - t)[:, None, None] * x + t[:, None, None] * fresh
        return 0.5 * jnp.sum(jnp.log1p(jnp.exp(-judge(noisy, t)[1])))

    found = gradient(config, scores, clean, recording, gan=0.5)
    np.testing.assert_allclose(found / clean[0].size, jax.grad(written_out)(clean), rtol=1e-4, atol=1e-6)
    assert len(seen) == 1
    loss, said = losses.student_loss(config, 0.5, scores, judge, clean, jnp.full(64, 0.9), KEY)
    np.testing.assert_allclose(jnp.sum(loss), written_out(clean), rtol=1e-5)
    np.testing.assert_allclose(said["gan_share"], 1, rtol=1e-5)  # fake score and teacher agree


def test_r1_is_zero_without_more_noise():
    real, fake, sigma = samples(), samples() + 1, jnp.full(64, 0.5)
    logits = lambda x, t: jnp.sum(x, (1, 2))
    value = lambda **changes: losses.discriminator_loss(DiscriminatorConfig(**changes), logits, real, fake, sigma, KEY)
    loss, said = value(r1_alpha=0.0)
    assert np.abs(said["r1"]).max() == 0
    np.testing.assert_allclose(
        loss, jnp.log1p(jnp.exp(-logits(real, sigma))) + jnp.log1p(jnp.exp(logits(fake, sigma))), 1e-5
    )
    # The logit of a sum of six numbers moves by alpha times a sum of six: on average alpha^2 6, halved by gamma / 2.
    more, said = value(r1_alpha=0.1)
    assert float(said["r1"].mean()) == pytest.approx(0.06, rel=0.3)
    np.testing.assert_allclose(more - loss, 0.5 * said["r1"], rtol=1e-4, atol=1e-5)
    assert said["real_right"].mean() + said["fake_right"].mean() == pytest.approx(
        float((logits(real, 0) > 0).mean() + (logits(fake, 0) < 0).mean())
    )


def test_fake_score_learns_the_samples_velocity():
    clean, sigma, fresh = samples(), jnp.full(64, 0.5), samples() * 2
    noisy = 0.5 * clean + 0.5 * fresh
    assert np.abs(losses.fake_loss(lambda x, t: fresh - clean, noisy, sigma, clean, fresh)).max() == 0
    off = losses.fake_loss(lambda x, t: fresh - clean + 2, noisy, sigma, clean, fresh)
    np.testing.assert_allclose(off, 4, rtol=1e-5)


def test_fake_score_moves_towards_the_student():
    fake, student = {"a": jnp.float32([1, 2])}, {"a": jnp.float32([3, -2])}
    np.testing.assert_allclose(losses.mixed(fake, student, 0.03)["a"], [0.97 + 0.09, 1.94 - 0.06], rtol=1e-6)
    # A gap shrinks by 0.97 each time.
    for _ in range(10):
        fake = losses.mixed(fake, student, 0.03)
    np.testing.assert_allclose(student["a"] - fake["a"], np.float32([2, -4]) * 0.97**10, rtol=1e-4)


def test_noise_levels():
    """Guidance is below the student's own input, always; the distribution term is everywhere."""
    config = MatchingConfig()
    inputs = np.float32([1.0, 0.9674, 0.7672, 0.05, 0.01])
    drawn = np.asarray(noise.ca_sigmas(config, KEY, jnp.asarray(np.repeat(inputs, 20_000)))).reshape(5, -1)
    least = np.where(inputs > config.ca_least_sigma, config.ca_least_sigma, 0)
    assert (drawn.max(1) < inputs).all()
    assert (drawn.min(1) >= least).all()
    np.testing.assert_allclose(drawn.mean(1), (inputs + least) / 2, rtol=0.02)
    dm = np.asarray(noise.dm_sigmas(config, KEY, 20_000))
    assert dm.min() < 0.03
    assert dm.max() > 0.97
    fake = np.asarray(noise.fake_sigmas(FakeConfig(), KEY, 20_000))
    assert 0.001 <= fake.min() < 0.01
    assert 0.99 < fake.max() <= 0.999
    steps = np.asarray(noise.trained_steps(GeneratorConfig(trained_step="sample"), KEY, 20_000))
    np.testing.assert_allclose(np.bincount(steps) / 20_000, 0.25, atol=0.02)
    shared = np.asarray(jax.vmap(lambda key: noise.trained_steps(GeneratorConfig(), key, 3))(jax.random.split(KEY, 40)))
    assert (shared == shared[:, :1]).all()
    assert set(shared[:, 0].tolist()) == {0, 1, 2, 3}
    np.testing.assert_array_equal(noise.quarter_of(jnp.float32([0.0, 0.3, 0.99, 1.0])).argmax(1), [0, 1, 3, 3])


def velocity(x, t):
    return jnp.sin(3 * x) * t[:, None, None] + 0.3 * x


def test_simulation_is_the_deployed_sampler():
    """Each row stops before its own step; from the last one the prediction is what the sampler ends with."""
    sigmas, start = jnp.asarray(sampler.sigma_schedule(4096, 4)), samples(5)
    np.testing.assert_allclose(sigmas, [1, 0.9674, 0.9081, 0.7672, 0], atol=5e-5)  # the deployment's
    final, trajectory = sampler.euler(velocity, start, sigmas)
    states = [start, *trajectory[:-1]]
    config, steps = GeneratorConfig(trained_step="sample"), jnp.int32([3, 0, 1, 2, 3])
    at = generator.simulate(config, velocity, start, sigmas, steps, KEY)
    np.testing.assert_allclose(at.sigma, sigmas[steps])
    for row, step in enumerate(steps):
        np.testing.assert_allclose(at.latents[row], states[step][row], rtol=1e-6, atol=1e-6)
    drawn = generator.generate(config, velocity, start, sigmas, steps, KEY)
    np.testing.assert_allclose(drawn, generator.predict(velocity, at), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(drawn[0], final[0], rtol=1e-5, atol=1e-6)
    # Gradient through the last step alone.
    scale = lambda a: jnp.sum(generator.predict(lambda x, t: a * velocity(x, t), generator.simulate(
        config, lambda x, t: jax.lax.stop_gradient(a) * velocity(x, t), start, sigmas, steps, KEY)))  # fmt: skip
    expected = -jnp.sum(at.sigma[:, None, None] * velocity(at.latents, at.sigma))
    np.testing.assert_allclose(jax.jit(jax.grad(scale))(1.0), expected, rtol=1e-4)


def test_renoised_steps():
    """Of a network that knows the clean sample, each step has its level's share of fresh noise."""
    sigmas, start = jnp.asarray(sampler.sigma_schedule(4096, 4)), samples(400)
    config = GeneratorConfig(transition="renoise", trained_step="sample")
    at = generator.simulate(config, towards(5.0), start, sigmas, jnp.full(400, 2), KEY)
    level = float(sigmas[2])
    assert float(at.latents.mean()) == pytest.approx(5 * (1 - level), abs=0.1)
    assert float(at.latents.std()) == pytest.approx(level, rel=0.05)
    assert abs(np.corrcoef(at.latents.ravel(), start.ravel())[0, 1]) < 0.1
    drawn = generator.generate(config, towards(5.0), start, sigmas, jnp.full(400, 3), KEY)
    np.testing.assert_allclose(drawn, 5, atol=1e-4)


def test_path_of_the_teacher():
    """With a substep it is the sampler's, with many it converges; it goes through every level."""
    sigmas, start = jnp.asarray(sampler.sigma_schedule(64, 4)), samples(3)
    _, trajectory = sampler.euler(velocity, start, sigmas)
    np.testing.assert_allclose(path(velocity, start, sigmas, 1), [start, *trajectory], rtol=1e-5, atol=1e-6)
    ends = [path(velocity, start, sigmas, substeps)[-1] for substeps in (8, 16, 32)]
    assert np.abs(ends[2] - ends[1]).max() < 0.6 * np.abs(ends[1] - ends[0]).max()


@pytest.mark.slow
def test_heads_are_convolutions_of_the_grid():
    """The same numbers and gradients as a padded 3 x 3 convolution, with padding behind the grid or none."""
    rows, columns, padded = 3, 5, 18
    config = DistillConfig(
        model=DenoiserConfig(layers=2, heads=1, head_dim=8, rope_axes=(2, 2, 4)),
        discriminator=DiscriminatorConfig(width=4, groups=2),
    )
    tree = heads.init(config, KEY)
    assert list(tree) == ["after_1"]
    x = jax.random.normal(jax.random.key(1), (2, rows * columns, 8))
    more = jnp.pad(x, ((0, 0), (0, padded - rows * columns), (0, 0)), constant_values=9.0)
    logits = lambda tree, x, n, tokens: heads.logits(
        config.discriminator, tree, (x,), jnp.asarray(heads.neighbours((rows, columns), tokens)), n
    )

    def written_out(tree, x):
        head = tree["after_1"]
        kernel = head["conv"]["kernel"].reshape(3, 3, 8, 4)
        grid = x.reshape(2, rows, columns, 8)
        y = jax.lax.conv_general_dilated(grid, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y = (y + head["conv"]["bias"]).reshape(2, -1, 2, 2)
        y = (y - y.mean((1, 3), keepdims=True)) / jnp.sqrt(y.var((1, 3), keepdims=True) + 1e-5)
        y = y.reshape(2, -1, 4) * head["norm"]["scale"] + head["norm"]["bias"]
        return (jax.nn.silu(y) @ head["out"]["kernel"]).mean(1) + head["out"]["bias"]

    expected = written_out(tree, x)
    np.testing.assert_allclose(logits(tree, x, None, 15), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits(tree, more, jnp.int32(15), padded), expected, rtol=1e-4, atol=1e-5)
    wanted = jax.grad(lambda t, x: jnp.sum(jnp.sin(written_out(t, x))), (0, 1))(tree, x)
    found = jax.grad(lambda t, x: jnp.sum(jnp.sin(logits(t, x, jnp.int32(15), padded))), (0, 1))(tree, more)
    np.testing.assert_allclose(found[1][:, :15], wanted[1], rtol=1e-3, atol=1e-5)
    assert np.abs(found[1][:, 15:]).max() == 0
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(wanted[0])):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("unroll", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_features_of_the_teacher(unroll):
    """The velocity beside features is that of an ordinary pass, and a gradient comes through the features alone."""
    model = DenoiserConfig(
        layers=3, heads=1, head_dim=8, rope_axes=(2, 2, 4), latent_channels=4, text_width=8, text_layers=1,
        dtype="float32", unroll=unroll,
    )  # fmt: skip

    @jax.jit
    def make():
        tree = denoiser.init(model, KEY)
        return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), tree)

    params, positions = make(), joint_positions(2, 2, 2)
    x = jax.random.normal(KEY, (2, 4, 4))
    rest = (jnp.ones((2, 2, 8)),), jnp.int32([2, 0]), jnp.float32([0.2, 0.9]), positions

    @jax.jit
    def passes(x):
        run = lambda after, velocity: denoiser.apply_with_features(
            model, params, x, *rest, after=after, velocity=velocity
        )
        plain = denoiser.apply(model, params, x, *rest)
        (first, last), found = run((1, 3), True)
        (alone,), none = run((1,), False)
        assert none is None
        through_velocity = jax.grad(lambda x: jnp.sum(denoiser.apply_with_features(
            model, params, x, *rest, after=(1,), velocity=True)[1]))(x)  # fmt: skip
        through_features = jax.grad(lambda x: jnp.sum(denoiser.apply_with_features(
            model, params, x, *rest, after=(1,), velocity=True)[0][0]))(x)  # fmt: skip
        return plain, found, first, alone, last, through_velocity, through_features

    plain, found, first, alone, last, through_velocity, through_features = passes(x)
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(first, alone, rtol=1e-5, atol=1e-6)
    assert first.shape == last.shape == (2, 4, 8)
    assert np.abs(first - last).max() > 1e-3
    assert np.abs(through_velocity).max() == 0
    assert np.abs(through_features).min() > 0
