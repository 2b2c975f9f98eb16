"""What is drawn at random in distillation: the step that is trained, and the noise levels of each term.

sigma is 1 at pure noise and 0 at clean, as everywhere here. The guidance term (CA) is evaluated at levels *below* that
of the student's own input; the paper of decoupled DMD has time run the other way, from noise to clean, and writes
tau ~ U(t, 1) for it. The distribution term (DM) is evaluated at nearly all levels, whatever the student's step.
"""

import jax
import jax.numpy as jnp

from lens_jax.diffusion import flow
from lens_jax.posttraining.distill_config import FakeConfig, GeneratorConfig, MatchingConfig

# What is measured by noise level is in this many equal parts of it.
QUARTERS = 4


def trained_steps(config: GeneratorConfig, key: jax.Array, rows: int) -> jax.Array:
    """The step of the student that is trained, from 0, of each row: int32 [rows], uniform."""
    count = 1 if config.trained_step == "batch" else rows
    return jnp.broadcast_to(jax.random.randint(key, (count,), 0, config.num_inference_steps), (rows,))


def dm_sigmas(config: MatchingConfig, key: jax.Array, rows: int) -> jax.Array:
    """Noise levels of the distribution term, float32 [rows]."""
    return _uniform(key, rows, *config.dm_sigmas)


def ca_sigmas(config: MatchingConfig, key: jax.Array, sigma: jax.Array) -> jax.Array:
    """Noise levels of the guidance term, float32 like `sigma` [rows], the level of the student's input, and below it.

    Where that is no higher than the least level, they are uniform from 0.
    """
    least = jnp.where(sigma > config.ca_least_sigma, config.ca_least_sigma, 0)
    share = flow.by_rows(jax.random.uniform(key, sigma.shape, jnp.float32), sigma)
    drawn = least + (sigma - least) * share
    return jnp.minimum(drawn, jnp.nextafter(sigma, 0))  # rounding must not reach it


def fake_sigmas(config: FakeConfig, key: jax.Array, rows: int) -> jax.Array:
    """Noise levels that fake score and discriminator are trained at, float32 [rows]."""
    return _uniform(key, rows, *config.sigmas)


def _uniform(key: jax.Array, rows: int, least: float, most: float) -> jax.Array:
    return jax.random.uniform(key, (rows,), jnp.float32, least, most)


def quarter_of(sigma: jax.Array) -> jax.Array:
    """One-hot float32 [rows, QUARTERS] of noise levels."""
    number = jnp.clip((sigma * QUARTERS).astype(jnp.int32), 0, QUARTERS - 1)
    return (number[:, None] == jnp.arange(QUARTERS)).astype(jnp.float32)
