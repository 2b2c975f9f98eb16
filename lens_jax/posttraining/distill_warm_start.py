"""The warm start of a student: regression to the teacher's guided path between the student's noise levels.

The report has none. It shortens the time in which the student's samples are blurred: a step of the teacher's weights
as they are predicts the mean of all images that a noised one may be of.
"""

import jax
import jax.numpy as jnp

from lens_jax.diffusion import flow, sampler
from lens_jax.diffusion.sampler import Velocity, level_of_rows
from lens_jax.posttraining.distill_config import GeneratorConfig, WarmStartConfig
from lens_jax.posttraining.distill_networks import Networks, draw_noise, uncaptioned
from lens_jax.run.state import Tree
from lens_jax.run.step import Batch


def regression_loss(
    networks: Networks,
    generator: GeneratorConfig,
    config: WarmStartConfig,
    params: Tree,
    frozen: Tree,
    batch: Batch,
    key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared distance of the student's velocity at each of its levels to the teacher's mean velocity from there
    to the next, along the teacher's path."""
    teacher = networks.velocity(frozen["teacher"], None, batch)
    if config.guidance_scale != 1:
        captioned, other = teacher, networks.velocity(frozen["teacher"], None, uncaptioned(batch))
        scale = jnp.float32(config.guidance_scale)
        teacher = lambda x, t: sampler.guide(captioned(x, t), other(x, t), scale)
    sigmas, n_image = batch["sigmas"], batch.get("n_image")
    points = path(teacher, draw_noise(key, batch, networks.model.latent_channels), sigmas, config.substeps)
    student = networks.velocity(frozen["teacher"], params[networks.student], batch)

    @jax.checkpoint  # a step at a time, in the backward pass too
    def at_step(step: jax.Array) -> jax.Array:
        x, sigma = points[step], sigmas[step]
        target = (points[step + 1] - x) / (sigmas[step + 1] - sigma)
        error = student(x, level_of_rows(x, sigma)).astype(jnp.float32) - target
        return flow.mean_of_tokens(jnp.square(error), n_image)

    by_step = jax.lax.map(at_step, jnp.arange(generator.num_inference_steps))
    mean = jnp.mean(by_step)
    return mean, {"regression_loss": jnp.stack([mean, jnp.ones(())])}


def path(velocity: Velocity, noise: jax.Array, sigmas: jax.Array, substeps: int) -> jax.Array:
    """Latents [steps + 1, B, N, C] at each of sigmas [steps + 1], by so many Euler steps between two of them."""

    def step(x, pair):
        first, last = pair

        def turn(number, x):
            sigma, following = (first + (last - first) * (number + i) / substeps for i in (0, 1))
            return x + (following - sigma) * velocity(x, level_of_rows(x, sigma)).astype(x.dtype)

        x = jax.lax.fori_loop(0, substeps, turn, x)
        return x, x

    _, after = jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))
    return jax.lax.stop_gradient(jnp.concatenate([noise[None], after]))
