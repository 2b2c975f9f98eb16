"""The three denoisers of distillation: the frozen teacher, the student, and the fake score.

With adapters one frozen base is the teacher, and student and fake score are an adapter each beside it: params {"lora"}
and {"fake"}. Without, each is a denoiser of its own: params {"denoiser"} and {"fake"}. The student has the name that
whatever is trained has in other runs, so that all that reads runs reads it too.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lens_jax import parallel
from lens_jax.diffusion.sampler import Velocity
from lens_jax.models import denoiser, lora
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.layers import layout
from lens_jax.models.lora import LoraConfig
from lens_jax.parallel.mesh import ReduceDtype
from lens_jax.posttraining import distill_discriminator
from lens_jax.posttraining.distill_config import DiscriminatorConfig, DistillConfig
from lens_jax.posttraining.distill_losses import Judge
from lens_jax.run.state import Tree
from lens_jax.run.step import Batch


@dataclasses.dataclass(frozen=True)
class Networks:
    """What makes velocities and logits of the trees of a state; hashable."""

    model: DenoiserConfig
    # Rank 0 trains denoisers themselves.
    lora: LoraConfig
    discriminator: DiscriminatorConfig
    # The teacher's blocks after which there is a head.
    blocks: tuple[int, ...]
    reduce_dtype: ReduceDtype = "compute"

    @classmethod
    def of(cls, config: DistillConfig) -> "Networks":
        return cls(config.model, config.lora, config.discriminator, config.blocks, config.mesh.reduce_dtype)

    @property
    def student(self) -> str:
        """The name of the student's tree, in a state's params and average."""
        return "lora" if self.lora.rank else "denoiser"

    @property
    def _gather(self) -> Callable:
        return functools.partial(parallel.gather, dtype=self.model.dtype, reduce_dtype=self.reduce_dtype)

    def velocity(self, teacher: Tree, tree: Tree | None, batch: Batch) -> Velocity:
        """(latents [B, N, C], t [B]) -> velocity, for the captions of a batch.

        teacher: the frozen tree. tree: that of student or fake score; None is the teacher itself.
        """
        if self.lora.rank:
            params, adapter = teacher, tree and lora.scaled(tree, self.lora.scale)
        else:
            params, adapter = teacher if tree is None else tree, None
        text, lengths, positions, n_image = _conditions(batch)

        def velocity(latents, t):
            inputs = latents, text, lengths, t, positions, n_image
            return denoiser.apply(self.model, params, *inputs, gather=self._gather, lora=adapter)

        return velocity

    def judge(self, teacher: Tree, heads: Tree, batch: Batch, velocity: bool) -> Judge:
        """(latents, t) -> (the teacher's velocity, or None where it is not wanted; logits [B])."""

        def judge(latents, t):
            text, lengths, positions, n_image = _conditions(batch)
            inputs = latents, text, lengths, t, positions, n_image
            features, found = denoiser.apply_with_features(
                self.model, teacher, *inputs, after=self.blocks, velocity=velocity, gather=self._gather
            )
            logits = distill_discriminator.logits(self.discriminator, heads, features, batch["neighbours"], n_image)
            return found, logits

        return judge


def _conditions(batch: Batch):
    return batch["text"], batch["text_lengths"], batch["positions"], batch.get("n_image")


def uncaptioned(batch: Batch) -> Batch:
    """A batch without text, which is the release's unconditional case: the text stream need not be there."""
    tokens = image_tokens(batch)
    return {
        **batch,
        "text": tuple(layer[:, :0] for layer in batch["text"]),
        "text_lengths": jnp.zeros_like(batch["text_lengths"]),
        "positions": batch["positions"][:tokens],
    }


def image_tokens(batch: Batch) -> int:
    """Latent tokens of a row, with their padding."""
    return batch["positions"].shape[0] - batch["text"][0].shape[1]


def draw_noise(key: jax.Array, batch: Batch, channels: int) -> jax.Array:
    """Noise [B, N, C] as `flow.noise_like` draws it for latents; a batch of captions alone has none to be like."""
    place = layout(batch["text_lengths"])
    if place is not None:
        place = PartitionSpec(None, place.spec[0], None)
    shape = image_tokens(batch), len(batch["text_lengths"]), channels
    return jax.random.normal(key, shape, out_sharding=place).swapaxes(0, 1)


def without_gradient(tree: Tree) -> Tree:
    return jax.tree.map(jax.lax.stop_gradient, tree)
