"""Lens in JAX and Flax: train, sample and convert the 3.8B text-to-image system of arXiv 2605.21573.

The package is organised by what the code is about: `models` (what the networks compute), `encoders` (what stands in
front of the denoiser), `diffusion` (flow matching and sampling), `parallel` (the mesh), `data` (records to batches),
`run` (the training core), `pretraining`, `inference`. Importing `lens_jax` is cheap: what needs JAX is imported when it
is asked for, `from lens_jax import LensPipeline` too.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "LensPipeline":
        from lens_jax.inference.pipeline import LensPipeline

        return LensPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
