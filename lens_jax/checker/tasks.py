"""The prompts of the scene benchmark: GenEval's six tasks and three more, on combinations that training never saw."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lens_jax.data import scene_sampler
from lens_jax.data.buckets import Bucket
from lens_jax.data.scenes import Concept, Scene

# What differs in colour alone: attributes must go to the right one of two.
TWINS = ("red_apple", "green_apple", "closed_book", "blue_book", "green_book")
_ATTEMPTS = 20_000


@dataclass(frozen=True)
class Task:
    """One type of prompts."""

    # GenEval's name, or ours for what it does not have.
    group: str
    # Kinds of `scene_sampler.KINDS` that it draws from, in turn.
    kinds: tuple[str, ...]
    # Criteria of `verdict.py` that make an image right in this task.
    criteria: tuple[str, ...]


TASKS = {
    "single": Task("single object", ("one",), ("objects",)),
    "two": Task("two objects", ("two",), ("objects", "place")),
    "count_2": Task("counting", ("same two",), ("objects",)),
    "count_3": Task("counting", ("same three",), ("objects",)),
    "count_4": Task("counting", ("same four",), ("objects",)),
    "colours": Task("colours", ("one",), ("objects", "background")),
    "position": Task("position", ("relation",), ("objects", "relation")),
    "attribution": Task("colour attribution", ("two", "relation"), ("objects", "place", "relation")),
    "many": Task("many", ("three", "four"), ("objects", "place")),
    "size": Task("size", ("one",), ("objects", "size")),
    "text_3": Task("text", ("word", "word and one"), ("word",)),
    "text_4": Task("text", ("word", "word and one"), ("word",)),
    "text_5": Task("text", ("word", "word and one"), ("word",)),
    "text_6": Task("text", ("word", "word and one"), ("word",)),
}


@dataclass(frozen=True)
class BenchPrompt:
    """A scene to ask for."""

    # A name of TASKS.
    task: str
    scene: Scene
    # Whether a combination in it is one that training never sees. Only of twins there may be too few of those.
    held_out: bool


def bench_prompts(
    concepts: Sequence[Concept], buckets: Sequence[Bucket], tasks: Sequence[str], count: int, seed: int
) -> list[BenchPrompt]:
    """`count` scenes for each task and size; those of a task and size do not depend on the others."""
    return [prompt for task in tasks for bucket in buckets for prompt in _of_task(concepts, bucket, task, count, seed)]


def lacks(task: str, concepts: Sequence[Concept]) -> str:
    """What a task would need besides these concepts, in words; empty where it can be asked of them."""
    needed = max(scene_sampler.OBJECTS[kind][1] for kind in TASKS[task].kinds)
    if task == "attribution":
        twins = [concept.id for concept in concepts if concept.id in TWINS]
        return "" if len(twins) >= needed else f"{needed} of {', '.join(TWINS)}"
    return "" if len(concepts) >= needed else f"{needed} concepts"


def _of_task(concepts: Sequence[Concept], bucket: Bucket, task: str, count: int, seed: int) -> list[BenchPrompt]:
    entropy = [seed, list(TASKS).index(task), bucket.height, bucket.width]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
    twins = task == "attribution"
    chosen = [concept for concept in concepts if concept.id in TWINS] if twins else concepts
    prompts: list[BenchPrompt] = []
    for _ in range(_ATTEMPTS):
        if len(prompts) == count:
            break
        kind = TASKS[task].kinds[len(prompts) % len(TASKS[task].kinds)]
        scene = scene_sampler.sample_scene(rng, chosen, bucket, "all", kind)
        if fits(task, scene) and (twins or scene_sampler.held_out(scene)):
            prompts.append(BenchPrompt(task, scene, scene_sampler.held_out(scene)))
    return prompts


def fits(task: str, scene: Scene) -> bool:
    """Whether a scene of one of the task's kinds is of the task."""
    if task.startswith("text"):
        return len(scene.word.text) == int(task[-1])
    return bool(scene.objects[0].size) == (task == "size")
