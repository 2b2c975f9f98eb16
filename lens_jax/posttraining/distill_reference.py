"""What the teacher draws as it is deployed, in numbers: its latents' mean and deviation."""

import functools

import jax
import jax.numpy as jnp

from lens_jax.diffusion import flow, sampler
from lens_jax.posttraining.distill_networks import Networks, draw_noise, uncaptioned
from lens_jax.run.state import Tree
from lens_jax.run.step import Batch


@functools.partial(jax.jit, static_argnums=(0, 1))
def reference_program(
    networks: Networks, guidance_scale: float, teacher: Tree, batch: Batch, sigmas: jax.Array, seed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(mean, deviation within a sample) of the teacher's guided samples for the captions of a batch, float32 scalars.

    sigmas: [steps + 1].
    """
    captioned = networks.velocity(teacher, None, batch)
    other = networks.velocity(teacher, None, uncaptioned(batch))
    scale = jnp.float32(guidance_scale)
    guided = lambda x, t: sampler.guide(captioned(x, t), other(x, t), scale)
    velocity = captioned if guidance_scale == 1 else guided
    noise = draw_noise(jax.random.key(seed), batch, networks.model.latent_channels)
    latents, _ = sampler.euler(velocity, noise, sigmas)
    n_image = batch.get("n_image")
    mean = flow.mean_of_tokens(latents, n_image)
    variance = flow.mean_of_tokens(jnp.square(latents - mean[:, None, None]), n_image)
    return jnp.mean(mean), jnp.mean(jnp.sqrt(variance))
