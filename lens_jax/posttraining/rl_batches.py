"""An epoch that was drawn as the batches of its updates, and whose turn it is."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lens_jax import parallel
from lens_jax.encoders.text import TextFeatures
from lens_jax.posttraining import nft
from lens_jax.posttraining import rl_recipe as recipe
from lens_jax.posttraining.advantages import Advantages, goodness
from lens_jax.posttraining.epoch import Chunk, Images, levels_of
from lens_jax.posttraining.rl_config import RlConfig
from lens_jax.posttraining.rollout import Sizes, conditions
from lens_jax.run.step import Batch


class Turn(NamedTuple):
    """An optimiser step: which epoch it belongs to, and which of its updates it is."""

    number: int
    epoch: int
    update: int


class Schedule:
    """Whose turn it is: the `Batches` of a run, since all else follows from the state."""

    def __init__(self, number: int, updates: int, mark: int):
        """`mark` tells the prompts from others."""
        self._number, self._updates, self._mark = number, updates, mark

    def __next__(self) -> Turn:
        turn = Turn(self._number, *divmod(self._number, self._updates))
        self._number += 1
        return turn

    @property
    def position(self) -> dict[str, Any]:
        return {"update": self._number, "prompts": self._mark}

    def close(self) -> None:
        """Nothing is read ahead."""


class Drawn(NamedTuple):
    """An epoch that is to be trained on."""

    epoch: int
    images: Images
    # The batches as they were drawn, with the latents of the images, or all of their paths, in the hosts' memory.
    chunks: list[tuple[Chunk, tuple[jax.Array, ...]]]
    # Of the prompt of each group.
    features: TextFeatures
    advantages: Advantages


def micro_batches(config: RlConfig, sizes: Sizes, drawn: Drawn, update: int, mesh: Mesh | None) -> Iterator[Batch]:
    """The batches of one update of an epoch, on the devices: each that was drawn, at each level it is trained at."""
    turns = recipe.turns(config)
    mine = drawn.chunks[update :: turns.updates]
    counted = drawn.advantages.valid.ravel()
    if config.algorithm == "grpo":
        # What has no advantage is left out of the mean, unless nothing has.
        telling = counted & (drawn.advantages.values.ravel() != 0)
        shown = np.concatenate([chunk.images[: chunk.count] for chunk, _ in mine])
        counted = telling if telling[shown].any() else counted
    for chunk, kept in mine:
        read = conditions(sizes, chunk.size, drawn.features, drawn.images.group[chunk.images], mesh)
        weight = (counted[chunk.images] & (np.arange(len(chunk.images)) < chunk.count)).astype(np.float32)
        for number in range(turns.levels):
            make = _nft_batch if config.algorithm == "nft" else _grpo_batch
            values, latents = make(config, sizes, drawn, chunk, kept, number, turns.levels)
            step = {"step": values.pop("step")} if "step" in values else {}
            rows = parallel.rows_of_host(mesh, len(chunk.images))
            values = {name: value[rows] for name, value in {**values, "weight": weight}.items()}
            yield {**read, **parallel.place_batch({**values, **step}, mesh), **parallel.on_device(latents, mesh)}


def _nft_batch(config: RlConfig, sizes: Sizes, drawn: Drawn, chunk: Chunk, kept, number: int, levels: int):
    """Clean latents, the noise level of each image, and how good it is."""
    sigmas = recipe.rollout_inputs(config, sizes.tokens(chunk.size))[1]
    pool, _ = nft.levels(config.nft, config.rollout.num_inference_steps)
    chosen = levels_of(config.seed, drawn.epoch, chunk.images, pool, levels)[:, number]
    r = goodness(drawn.advantages.values.ravel()[chunk.images], config.nft.z_c)
    return {"t": sigmas[chosen], "r": r}, {"latents": kept[-1]}


def _grpo_batch(config: RlConfig, sizes: Sizes, drawn: Drawn, chunk: Chunk, kept, number: int, levels: int):
    """Latents before and after a step of the path, the step, and the advantage of each image."""
    steps = recipe.noisy_steps(config, sizes.tokens(chunk.size))
    step = tuple(np.float32(part[number]) for part in steps)
    advantage = drawn.advantages.values.ravel()[chunk.images]
    return {"advantage": advantage, "step": step}, {"latents": kept[number], "after": kept[number + 1]}
