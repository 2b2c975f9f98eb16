"""How much the images of one prompt differ: what a model may lose when it is distilled, or rewarded.

A prompt is drawn from several noises, and its images are compared with each other (`posttraining/guards.py`). Prompts
are those of the scene benchmark in two densities: brief ones name a thing and leave the rest open, so that a model that
has lost its modes gives the same image again and again; dense ones say everything, and what differs is how.

The measure is of pixels, averaged over cells: it needs no other model, and it does not tell variety from dirt. Compare
it between models of the same world whose images are about as clean, the same prompts and the same noise, and look.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lens_jax.checker.tasks import BenchPrompt
from lens_jax.data import captions
from lens_jax.data.buckets import Bucket
from lens_jax.inference.pipeline import LensPipeline
from lens_jax.posttraining import guards

DENSITIES: tuple[captions.Density, ...] = ("brief", "dense")


@dataclass(frozen=True)
class Diversity:
    """Of prompts of one density."""

    # Over the prompts, and its standard error; None of one prompt.
    mean: float
    error: float | None
    # Images of each.
    images: int
    # `guards.diversity` of each prompt's images, in [0, 1], by the caption.
    by_prompt: dict[str, float]


def spread(prompts: Sequence[BenchPrompt], count: int, bucket: Bucket) -> list[BenchPrompt]:
    """At most `count` of the prompts of one size, evenly out of all tasks."""
    chosen = [prompt for prompt in prompts if prompt.scene.bucket == bucket]
    return [chosen[i * len(chosen) // count] for i in range(count)] if count < len(chosen) else chosen


def count(prompts: Sequence[BenchPrompt], images: int) -> int:
    """How many images `measure` draws, if no two prompts have the same caption."""
    return len(DENSITIES) * len(prompts) * images


def measure(
    pipe: LensPipeline,
    prompts: Sequence[BenchPrompt],
    language: str,
    images: int,
    seed: int,
    advance: Callable[[int], None] = lambda images: None,
) -> dict[str, Diversity]:
    """By density, how much `images` images of each prompt differ; {} without prompts.

    The prompts are of one size. The same seed gives every model the same noise. `advance` is told how many images were
    drawn since it was last called.
    """
    found = {}
    for density in DENSITIES if prompts else ():
        texts = list(dict.fromkeys(captions.caption(prompt.scene, language, density) for prompt in prompts))
        bucket, done = prompts[0].scene.bucket, 0

        def progress(drawn: int, _) -> None:
            nonlocal done
            advance(drawn - done)
            done = drawn

        options = {"height": bucket.height, "width": bucket.width, "num_images_per_prompt": images, "seed": seed}
        drawn = [np.asarray(image) for image in pipe(texts, **options, progress=progress).images]
        each = {text: guards.diversity(drawn[i * images : (i + 1) * images]) for i, text in enumerate(texts)}
        values = np.array(list(each.values()))
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        found[density] = Diversity(float(values.mean()), error, images, each)
    return found
