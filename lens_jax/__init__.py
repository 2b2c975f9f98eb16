"""Lens in JAX and Flax: train, sample and convert the 3.8B text-to-image system of arXiv 2605.21573.

The package is organised by what the code is about: `models` (what the networks compute), `text` (prompt to features),
`diffusion` (flow matching and sampling), `data` (records to batches), `training` (state, step, loop, checkpoints).
Importing `lens_jax` is cheap; JAX is imported by the modules that need it.
"""

__version__ = "0.1.0"
