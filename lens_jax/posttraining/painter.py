"""Draws many images batch by batch, and hands groups over as soon as they are complete.

The devices always have the next batch to work on while the host looks at the images of the one before.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lens_jax import parallel
from lens_jax.encoders.images import ImageCodec
from lens_jax.encoders.text import TextEncoder, TextFeatures
from lens_jax.posttraining import epoch as epochs
from lens_jax.posttraining import rollout
from lens_jax.posttraining.epoch import Chunk, Images
from lens_jax.posttraining.policy import Policy
from lens_jax.posttraining.rollout import Sizes
from lens_jax.run.state import Tree


class Settings(NamedTuple):
    """How images of so many tokens are drawn: what `rollout.rollout_program` takes besides."""

    solver: str
    # float32 [steps + 1], and for `rollout.SDE` [steps].
    sigmas: np.ndarray
    levels: np.ndarray | None
    # None is 1.
    guidance_scale: np.float32 | None


class Painter(NamedTuple):
    """All that stays the same from image to image."""

    policy: Policy
    codec: ImageCodec
    codec_params: dict
    sizes: Sizes
    batch_size: int
    mesh: Mesh | None

    def draw(
        self,
        fixed: Tree,
        tree: dict | None,
        images: Images,
        features: TextFeatures,
        keys: np.ndarray,
        settings: Callable[[int], Settings],
        on_group: Callable[[int, list[np.ndarray | None]], None],
        keep: bool,
        progress: Callable[[int], None] = lambda count: None,
    ) -> list[tuple[Chunk, Any]]:
        """Draw `images`; the batches with their latents, or paths, in the memory of the hosts where `keep` is set.

        All processes of a mesh must call it, and each is given all images.

        Args:
          fixed, tree: as in `rollout.rollout_program`.
          features: of the prompt of each group.
          keys: uint32 [images, 2], of their noise.
          settings: tokens of an image -> how it is drawn.
          on_group: (group, its images in order, None for one that is not finite), once a group, as soon as it is whole.
          progress: called with the number of images drawn.
        """
        sizes = self.sizes
        waiting: dict[int, dict[int, np.ndarray | None]] = {}
        members = np.bincount(images.group)
        found, before, count = [], None, 0

        def look_at(chunk: Chunk, decoded) -> None:
            nonlocal count
            pixels, finite = map(np.asarray, decoded)
            for row, number in enumerate(chunk.images[: chunk.count]):
                group, member = int(images.group[number]), int(images.member[number])
                # A copy: a view would keep the whole batch alive until the last of its groups has been judged.
                waiting.setdefault(group, {})[member] = pixels[row].copy() if finite[row] else None
                if len(waiting[group]) == members[group]:
                    whole = waiting.pop(group)
                    on_group(group, [whole[i] for i in range(len(whole))])
            count += chunk.count
            progress(count)

        for chunk in epochs.chunks_of(images, self.batch_size):
            grid, how = sizes.grids[chunk.size], settings(sizes.tokens(chunk.size))
            rows = chunk.images[parallel.rows_of_host(self.mesh, len(chunk.images))]
            batch = rollout.conditions(sizes, chunk.size, features, images.group[chunk.images], self.mesh)
            batch |= parallel.place_batch({"keys": keys[rows]}, self.mesh)
            program = parallel.on(self.mesh, rollout.rollout_program)
            drawn = program(self.policy, how.solver, fixed, tree, batch, how.sigmas, how.levels, how.guidance_scale)
            decoded = parallel.on(self.mesh, rollout.decode_program)(self.codec, grid, self.codec_params, drawn[-1])
            found.append((chunk, rollout.to_host(drawn, self.mesh) if keep else None))
            if before is not None:
                look_at(*before)
            before = chunk, decoded
        if before is not None:
            look_at(*before)
        return found


def keys_of(seed_key: jax.Array, number: int, images: Images) -> np.ndarray:
    """The keys [images, 2] of the noise of the images of an epoch, or of whatever `number` stands for."""
    prompts, members = (np.asarray(x, np.uint32) for x in (images.prompt, images.member))
    return np.asarray(rollout.row_keys(seed_key, np.uint32(number), prompts, members))


def encode(encoder: TextEncoder, prompts: Sequence[str], room: int) -> TextFeatures:
    """Features [B, room, width] of prompts on the host. All processes of a mesh must call it.

    Each is encoded alone, so that not even its last bit depends on its company, which a resumed run would not repeat.
    """
    alone = [encoder.encode([prompt]) for prompt in prompts]
    fit = lambda layer: np.pad(layer[:, :room], ((0, 0), (0, max(0, room - layer.shape[1])), (0, 0)))
    layers = (np.concatenate([fit(one.layers[i]) for one in alone]) for i in range(encoder.num_layers))
    return TextFeatures(tuple(layers), np.concatenate([np.minimum(one.lengths, room) for one in alone]), alone[0].date)


def longest(encoder: TextEncoder, prompts: Sequence[str], most: int) -> int:
    """Text tokens of the longest prompt, at least 1 and at most what the encoder reads."""
    return min(most, max(1, int(encoder.tokens(prompts).lengths.max())))
