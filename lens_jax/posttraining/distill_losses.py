"""The losses of distillation (report, section 6), of velocities alone: whatever network gives them.

x is clean, x_sigma = (1 - sigma) x + sigma noise, v = noise - x, and the clean prediction is x_sigma - sigma v. The
student's sample x moves against D / n, where D is one of

    DM  predicted by the fake score - predicted by the teacher, both with the caption
    CA  -(g - 1) (predicted by the teacher with the caption - predicted without)

each at noise levels of its own (`distill_noise`), and n the sample's mean distance to the teacher's prediction there.
In velocities a difference of two predictions is -sigma times theirs. Where fake score and teacher agree and g is 1,
nothing moves.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lens_jax.diffusion import flow, sampler
from lens_jax.diffusion.sampler import Velocity
from lens_jax.posttraining import distill_noise
from lens_jax.posttraining.distill_config import DiscriminatorConfig, MatchingConfig

# (latents [B, N, C], t [B]) -> (the teacher's velocity without a gradient, how real they look, float32 [B])
Judge = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
# What is added to the distance that a direction is divided by.
_LEAST_DISTANCE = 1e-6


class Scores(NamedTuple):
    """The velocities that pull the student; no gradient goes through them."""

    fake: Velocity
    teacher: Velocity
    # The teacher without a caption. It is not asked at a guidance of 1.
    uncaptioned: Velocity


class Direction(NamedTuple):
    """What a sample is moved against."""

    # D above, [B, N, C].
    difference: jax.Array
    # n above, float32 [B].
    distance: jax.Array

    @property
    def gradient(self) -> jax.Array:
        return self.difference / self.distance[:, None, None]


def dm_direction(
    clean: jax.Array, noisy: jax.Array, sigma: jax.Array, fake: jax.Array, teacher: jax.Array, n_image=None
) -> Direction:
    """Of samples `clean` [B, N, C] that were noised to `noisy` at sigma [B], from the two velocities there."""
    level = sigma[:, None, None]
    return Direction(-level * (fake - teacher), _distance(clean, noisy - level * teacher, n_image))


def ca_direction(
    config: MatchingConfig,
    clean: jax.Array,
    noisy: jax.Array,
    sigma: jax.Array,
    captioned: jax.Array,
    uncaptioned: jax.Array,
    n_image=None,
) -> Direction:
    """As `dm_direction`, from the teacher's velocities with and without captions."""
    level = sigma[:, None, None]
    if config.rescale:
        change = sampler.guide(captioned, uncaptioned, jnp.float32(config.guidance_scale)) - captioned
    else:
        change = (config.guidance_scale - 1) * (captioned - uncaptioned)
    return Direction(level * change, _distance(clean, noisy - level * captioned, n_image))


def _distance(clean: jax.Array, predicted: jax.Array, n_image) -> jax.Array:
    return flow.mean_of_tokens(jnp.abs(clean - predicted), n_image) + _LEAST_DISTANCE


def pull(clean: jax.Array, gradient: jax.Array, n_image=None) -> jax.Array:
    """A loss a sample, float32 [B], whose gradient in `clean` [B, N, C] is `gradient` over the sample's numbers."""
    target = jax.lax.stop_gradient(clean - gradient)
    return 0.5 * flow.mean_of_tokens(jnp.square(clean - target), n_image)


def student_loss(
    config: MatchingConfig,
    gan_weight: float,
    scores: Scores,
    judge: Judge | None,
    clean: jax.Array,
    sigma: jax.Array,
    key: jax.Array,
    n_image: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The student's loss a sample, float32 [B], and what there is to say of it, all float32 [B] by name.

    Args:
      clean: the student's samples [B, N, C], with their gradient.
      sigma: noise level of the student's input [B].
      judge: the discriminator with the teacher's velocity, of one pass; None is without.

    Of what is said `dm_sigma` and `ca_sigma` are noise levels of the terms.
    """
    key_dm, key_noise, *keys_ca = jax.random.split(key, 4)
    fixed, parts = jax.lax.stop_gradient(clean), {}
    # Of the student's layout, so that no device computes the rows of the others.
    dm_sigma = flow.by_rows(distill_noise.dm_sigmas(config, key_dm, len(clean)), clean)
    noise = flow.noise_like(key_noise, clean)

    def realism(x):
        teacher, logits = judge(flow.interpolate(x, noise, dm_sigma), dm_sigma)
        return jnp.sum(jax.nn.softplus(-logits)), (teacher, logits)

    noisy = flow.interpolate(fixed, noise, dm_sigma)
    if judge is None:
        teacher = scores.teacher(noisy, dm_sigma)
    else:
        # Rows do not see each other, so the gradient of a sum has those of all samples.
        (_, (teacher, logits)), towards_real = jax.value_and_grad(realism, has_aux=True)(fixed)
    fake = scores.fake(noisy, dm_sigma)
    dm = dm_direction(fixed, noisy, dm_sigma, fake, teacher, n_image)
    gradient = dm.gradient
    error = lambda velocity: flow.mean_of_tokens(jnp.square(velocity.astype(jnp.float32) - (noise - fixed)), n_image)
    norm = lambda x: jnp.sqrt(flow.mean_of_tokens(jnp.square(x), n_image))
    mean = flow.mean_of_tokens(fixed, n_image)
    parts |= {
        "dm_sigma": dm_sigma,
        "dm_size": norm(dm.difference) / (norm(noisy - dm_sigma[:, None, None] * teacher) + _LEAST_DISTANCE),
        "fake_error": error(fake),
        "teacher_error": error(teacher),
        "sample_mean": mean,
        "sample_std": norm(fixed - mean[:, None, None]),
    }
    if config.guidance_scale != 1:
        ca, parts["ca_sigma"], parts["ca_size"] = _guidance(config, scores, fixed, sigma, *keys_ca, n_image, norm)
        gradient = gradient + ca.gradient
        inner = flow.mean_of_tokens(ca.gradient * dm.gradient, n_image)
        sizes = norm(ca.gradient), norm(dm.gradient)
        parts["dm_ca_cosine"] = inner / (sizes[0] * sizes[1] + 1e-12)
        parts["ca_over_dm"] = sizes[0] / (sizes[1] + 1e-12)
    loss = config.weight * pull(clean, gradient, n_image)
    if judge is not None:
        generator = jax.nn.softplus(-logits)
        # Its value, with the gradient that is known already.
        through = jnp.sum((clean - fixed) * towards_real, axis=(1, 2))
        loss = loss + gan_weight * (generator + through)
        # Of one number of a sample both gradients are means over all of them.
        count = clean.shape[2] * (clean.shape[1] if n_image is None else n_image)
        gan, matching = gan_weight * norm(towards_real) * count, config.weight * norm(gradient)
        parts |= {"gan_loss": generator, "gan_share": gan / (gan + matching + 1e-12)}
    return loss, jax.lax.stop_gradient(parts)


def _guidance(
    config, scores, fixed, sigma, key_sigma, key_noise, n_image, norm
) -> tuple[Direction, jax.Array, jax.Array]:
    """(the direction of the guidance term, its noise levels, its size beside the prediction)."""
    level = distill_noise.ca_sigmas(config, key_sigma, sigma)
    noisy = flow.interpolate(fixed, flow.noise_like(key_noise, fixed), level)
    captioned, uncaptioned = scores.teacher(noisy, level), scores.uncaptioned(noisy, level)
    ca = ca_direction(config, fixed, noisy, level, captioned, uncaptioned, n_image)
    predicted = norm(noisy - level[:, None, None] * captioned)
    return ca, level, norm(ca.difference) / (predicted + _LEAST_DISTANCE)


def fake_loss(fake: Velocity, noisy: jax.Array, sigma: jax.Array, clean, noise, n_image=None) -> jax.Array:
    """The fake score's flow matching on samples of the student, float32 [B]."""
    error = fake(noisy, sigma).astype(jnp.float32) - (noise - clean)
    return flow.mean_of_tokens(jnp.square(error), n_image)


def discriminator_loss(
    config: DiscriminatorConfig,
    logits: Callable[[jax.Array, jax.Array], jax.Array],
    real: jax.Array,
    fake: jax.Array,
    sigma: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of the heads a sample, float32 [B], and its parts, all float32 [B].

    Args:
      logits: (noised latents, sigma [B]) -> how real they look, float32 [B].
      real, fake: images and samples [B, N, C], noised to the same levels sigma.

    The penalty, an approximate R1, asks that a little more noise on what is real changes nothing.
    """
    of_real, of_fake = logits(real, sigma), logits(fake, sigma)
    loss = jax.nn.softplus(-of_real) + jax.nn.softplus(of_fake)
    parts = {"real_right": of_real > 0, "fake_right": of_fake < 0, "real_logit": of_real, "fake_logit": of_fake}
    if config.r1_gamma:
        moved = logits(real + config.r1_alpha * flow.noise_like(key, real), sigma)
        penalty = jnp.square(of_real - moved)
        loss, parts["r1"] = loss + 0.5 * config.r1_gamma * penalty, penalty
    parts = {name: part.astype(jnp.float32) for name, part in parts.items()}
    return loss, jax.lax.stop_gradient({**parts, "discriminator_loss": loss})


def mixed(fake: dict, student: dict, share: float) -> dict:
    """The fake score after an update of the student (IDA): `share` of it is the student's parameters, in float32."""
    return jax.tree.map(lambda phi, theta: (1 - share) * phi + share * theta, fake, student)
