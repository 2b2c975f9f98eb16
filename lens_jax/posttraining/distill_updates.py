"""What one update of each kind minimises in distillation: losses as `run.step` wants them, of batches of one shape.

A batch has `text`, `text_lengths`, `positions` and `n_image` as in pre-training, `latents` where there is a
discriminator, `sigmas` float32 [steps + 1], the student's noise levels for this size, and `neighbours` (see
`distill_discriminator`).
"""

import jax
import jax.numpy as jnp

from lens_jax.diffusion import flow
from lens_jax.posttraining import distill_generate as generator
from lens_jax.posttraining import distill_losses, distill_noise
from lens_jax.posttraining.distill_config import DistillConfig
from lens_jax.posttraining.distill_networks import Networks, draw_noise, uncaptioned, without_gradient
from lens_jax.run.state import Tree
from lens_jax.run.step import Batch

Result = tuple[jax.Array, dict[str, jax.Array]]
# Parts that are not told by noise level.
_OVERALL = ("sample_mean", "sample_std")


def fake_update_loss(config: DistillConfig, params: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> Result:
    """Of fake score and discriminator: params {"fake", "head"}, and the student among what is frozen."""
    networks, n_image = Networks.of(config), batch.get("n_image")
    key_sample, key_sigma, key_noise, key_real = jax.random.split(key, 4)
    student = networks.velocity(frozen["teacher"], frozen[networks.student], batch)
    noise, step_, key_walk = _begin(config, key_sample, batch)
    clean = generator.generate(config.generator, student, noise, batch["sigmas"], step_, key_walk)

    sigma = flow.by_rows(distill_noise.fake_sigmas(config.fake, key_sigma, len(clean)), clean)
    noise = flow.noise_like(key_noise, clean)
    noisy = flow.interpolate(clean, noise, sigma)
    fake = networks.velocity(frozen["teacher"], params["fake"], batch)
    losses = distill_losses.fake_loss(fake, noisy, sigma, clean, noise, n_image)
    parts = {"fake_loss": losses}
    if config.gan:
        key_noise, key_r1 = jax.random.split(key_real)
        judge = networks.judge(frozen["teacher"], params["head"], batch, velocity=False)
        real = flow.interpolate(batch["latents"], flow.noise_like(key_noise, clean), sigma)
        logits = lambda x, t: judge(x, t)[1]
        found, said = distill_losses.discriminator_loss(config.discriminator, logits, real, noisy, sigma, key_r1)
        losses, parts = losses + found, {**parts, **said}
    return jnp.mean(losses), {name: total(part) for name, part in parts.items()}


def student_update_loss(config: DistillConfig, params: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> Result:
    """Of the student: params {its tree}, and fake score and heads among what is frozen."""
    networks, n_image, teacher = Networks.of(config), batch.get("n_image"), frozen["teacher"]
    key_sample, key_loss = jax.random.split(key)
    tree = params[networks.student]
    noise, step_, key_walk = _begin(config, key_sample, batch)
    before = networks.velocity(teacher, without_gradient(tree), batch)
    at = generator.simulate(config.generator, before, noise, batch["sigmas"], step_, key_walk)
    clean = generator.predict(networks.velocity(teacher, tree, batch), at)

    scores = distill_losses.Scores(
        fake=networks.velocity(teacher, frozen["fake"], batch),
        teacher=networks.velocity(teacher, None, batch),
        uncaptioned=networks.velocity(teacher, None, uncaptioned(batch)),
    )
    judge = networks.judge(teacher, frozen["head"], batch, velocity=True) if config.gan else None
    losses, parts = distill_losses.student_loss(
        config.matching, config.discriminator.weight, scores, judge, clean, at.sigma, key_loss, n_image
    )
    return jnp.mean(losses), _by_noise_level(parts)


def _begin(config: DistillConfig, key: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(noise [B, N, C], the step that is trained [B], a key for fresh noise), rows where the batch has them."""
    key_noise, key_step, key_walk = jax.random.split(key, 3)
    noise = draw_noise(key_noise, batch, config.model.latent_channels)
    steps = flow.by_rows(distill_noise.trained_steps(config.generator, key_step, len(noise)), noise)
    return noise, steps, key_walk


def _by_noise_level(parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sums of parts [B] and their rows, [2], or where they depend on a noise level [2, QUARTERS] by it."""
    parts = dict(parts)
    dm = distill_noise.quarter_of(parts.pop("dm_sigma"))
    ca = distill_noise.quarter_of(parts.pop("ca_sigma")) if "ca_sigma" in parts else None
    found = {}
    for name, part in parts.items():
        if name in _OVERALL:
            found[name] = total(part)
        else:
            level = ca if name == "ca_size" else dm
            found[name] = jnp.stack([jnp.sum(level * part[:, None], 0), jnp.sum(level, 0)])
    return found


def total(part: jax.Array) -> jax.Array:
    """The sum of a part over rows, and the rows: [2]."""
    return jnp.stack([jnp.sum(part), jnp.float32(len(part))])
