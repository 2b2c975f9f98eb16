"""The three velocities of reinforcement learning: of the trained policy, of the old one that draws, of the reference.

With adapters they share one frozen base, `frozen {"denoiser"}`: trained is `params {"lora"}`, old is `extra {"old"}`,
and the reference is the base alone. Without, all three are denoisers: `params {"denoiser"}`, `extra {"old"}` and, where
a loss reads it, `frozen {"reference"}`.
"""

import dataclasses
import functools

import jax

from lens_jax import parallel
from lens_jax.diffusion import sampler
from lens_jax.models import denoiser, lora
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.lora import LoraConfig
from lens_jax.parallel.mesh import ReduceDtype
from lens_jax.run.state import Tree
from lens_jax.run.step import Batch


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is trained of the denoiser; hashable, so that it can be a static argument."""

    model: DenoiserConfig
    # Rank 0 trains the denoiser itself.
    lora: LoraConfig
    reduce_dtype: ReduceDtype = "compute"

    @property
    def trained(self) -> str:
        """The name of the tree that is trained, in a state's params and average."""
        return "lora" if self.lora.rank else "denoiser"

    def denoise(self, fixed: Tree, tree: dict | None, batch: Batch) -> sampler.Denoise:
        """The network of a policy, for `diffusion.sampler`.

        Args:
          fixed: the state's `frozen` and `extra`.
          tree: what is trained, of the policy that is meant; None is the reference.
          batch: with `n_image` where its latents are padded.
        """
        if self.lora.rank:
            params, adapter = fixed["denoiser"], tree and lora.scaled(tree, self.lora.scale)
        else:
            params, adapter = fixed["reference"] if tree is None else tree, None
        gather = functools.partial(parallel.gather, dtype=self.model.dtype, reduce_dtype=self.reduce_dtype)

        def denoise(latents, t, text, positions):
            n_image = batch.get("n_image")
            return denoiser.apply(
                self.model, params, latents, *text, t, positions, n_image, gather=gather, lora=adapter
            )

        return denoise

    def velocity(
        self, fixed: Tree, tree: dict | None, batch: Batch, guidance_scale: jax.Array | None = None
    ) -> sampler.Velocity:
        """(latents [B, N, C], t [B]) -> velocity, for the captions of a batch: `text`, `text_lengths`, `positions`."""
        text = batch["text"], batch["text_lengths"]
        tokens = batch["positions"].shape[0] - text[0][0].shape[1]
        return sampler.guided(self.denoise(fixed, tree, batch), tokens, text, None, batch["positions"], guidance_scale)
