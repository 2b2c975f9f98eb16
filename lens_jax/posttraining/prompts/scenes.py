"""`lens-jax prompts scenes`: a prompt set of the pictogram world without any language model, and one held out from it.

Each prompt is a scene and its caption; what an image must show is the scene itself, which the exact checker reads. Two
files are written: `prompts.jsonl` to learn from, and `held_out.jsonl` to measure by, which has no combination (a pair
of concepts, a concept so many times, a concept on some background, a word) that is in a prompt of the first.
"""

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from lens_jax.atomic import new_directory, write_json
from lens_jax.checker.tasks import TASKS, fits
from lens_jax.console import make_console
from lens_jax.data import captions, phrases, scene_json
from lens_jax.data.buckets import Bucket, parse_buckets
from lens_jax.data.scene_sampler import combinations, held_out, sample_scene
from lens_jax.data.scenes import Concept, Scene
from lens_jax.data.sources import openmoji
from lens_jax.errors import LensError, nearest
from lens_jax.posttraining.prompts.prompt import Prompt, write_prompts
from lens_jax.posttraining.prompts.report import tasks_between

_FORMAT = 1
# Scenes drawn in a row without one that can be taken, after which there are too few of them.
_ATTEMPTS = 20_000
# Settings that say nothing of what is in a set: the tasks that a report chose are among them by name.
_UNSAID = ("out", "overwrite", "report", "between")
# The dimensions of the report's prompts by what a scene asks for.
_DIMENSIONS = {
    "Attribute": lambda scene: any(placed.size for placed in scene.objects),
    "Spatial Relationship": lambda scene: bool(scene.relation) or any(placed.position for placed in scene.objects),
    "Count": captions.is_group,
    "Color": lambda scene: scene.name_background,
    "Text": lambda scene: scene.word is not None,
}


@dataclasses.dataclass(frozen=True)
class ScenePrompts:
    """Write prompts of the pictogram world, and others that are held out from them. Nothing is asked of a model."""

    # Folder of the set: prompts.jsonl, held_out.jsonl, manifest.json.
    out: str = "data/prompts/small"
    # What the prompts are about: single, two, count_2, count_3, count_4, colours, position, many, size, text_3, text_4,
    # text_5, text_6, as in `lens-jax evaluate --bench scenes`. A category is a group of them: counting, many, text.
    tasks: tuple[str, ...] = tuple(task for task in TASKS if task != "attribution")
    # A report of that benchmark (scenes.json, or its folder): of `tasks` only those of which the model it is of meets
    # everything asked in a share of images within `between`. Of others there is little to learn.
    report: str = ""
    between: tuple[float, float] = (0.3, 0.7)
    # Prompts of each category, shared out to its tasks.
    count: int = 320
    # Which combinations they have: those that pre-training saw, as prepare openmoji --hold-out leaves them in; those it
    # did not see; or both.
    combinations: Literal["seen", "unseen", "any"] = "seen"
    # Tasks of the held-out prompts; () takes those above and "single", whose score should not fall.
    held_out_tasks: tuple[str, ...] = ()
    # Held-out prompts of each category. Their combinations were not seen in pre-training either.
    held_out_count: int = 48
    # Sizes HEIGHTxWIDTH that scenes are laid out for, in turn: what is side by side in a wide image may lie on top of
    # each other in a tall one.
    sizes: tuple[str, ...] = ("64x64",)
    # How many concepts, the most distinct first: those of the data set that the model was trained on.
    concepts: int = len(openmoji.CONCEPTS)
    # Language of the prompts.
    language: str = "en"
    # How often an English prompt is a sentence ("a fox above a house on a pink background") and not a list of clauses.
    natural: float = 0.0
    # Seed of the scenes.
    seed: int = 0
    # Replace a set that is already there.
    overwrite: bool = False

    def __post_init__(self):
        for name in ("tasks", "held_out_tasks"):
            for task in getattr(self, name):
                if task not in TASKS or task == "attribution":
                    known = [task for task in TASKS if task != "attribution"]
                    accepted = ", ".join(known)
                    raise LensError(f"prompts scenes: {name} {task!r}{nearest(task, known)}; accepted: {accepted}")
        if not self.tasks or self.count < 1 or self.held_out_count < 0 or self.seed < 0:
            raise LensError("prompts scenes: tasks needs one, count at least 1, held_out_count and seed at least 0")
        if not 0 <= self.between[0] <= self.between[1] <= 1:
            raise LensError(f"prompts scenes: between is {self.between}; two shares, from 0 to 1, the lower one first")
        if not 0 <= self.natural <= 1:
            raise LensError(f"prompts scenes: natural is {self.natural}; it is a share, from 0 to 1")
        if self.language not in phrases.LANGUAGES:
            known = phrases.LANGUAGES
            raise LensError(
                f"prompts scenes: language {self.language!r}{nearest(self.language, known)}; accepted: "
                f"{', '.join(known)}"
            )


def make_scene_prompts(config: ScenePrompts, console: Console | None = None) -> Path:
    """Write the set; the folder. The same settings give the same bytes."""
    if config.report:
        tasks = tasks_between(config.report, config.tasks, config.between)
        config = dataclasses.replace(config, tasks=tasks, report="")
    train, test = draw_prompts(config)
    with new_directory(config.out, config.overwrite, "manifest.json") as folder:
        write_prompts(folder / "prompts.jsonl", train)
        if test:
            write_prompts(folder / "held_out.jsonl", test)
        write_json(folder / "manifest.json", _manifest(folder, config, train, test))
    out = Path(config.out)
    (console or make_console()).print(
        f"{len(train)} prompts in {out / 'prompts.jsonl'}"
        + (f", {len(test)} held out in {out / 'held_out.jsonl'}" if test else "")
    )
    return out


def draw_prompts(config: ScenePrompts) -> tuple[list[Prompt], list[Prompt]]:
    """(to learn from, held out): no combination of a held-out prompt is in one to learn from."""
    concepts, sizes = openmoji.load_concepts(config.concepts), parse_buckets(config.sizes)
    tasks = config.held_out_tasks or tuple(dict.fromkeys((*config.tasks, "single")))
    test: list[list[Prompt]] = []
    taken: set[tuple[str, ...]] = set()
    # Where pre-training saw none of what is learnt from, both share what it did not see.
    theirs = _reserved if config.combinations == "unseen" else held_out
    for task, count in _shares(tasks, config.held_out_count).items():
        drawn = _draw(config, concepts, sizes, task, "held_out", count, theirs)
        test.append([prompt for _, prompt in drawn])
        taken.update(key for scene, _ in drawn for key in combinations(scene))

    def learnable(scene: Scene) -> bool:
        wanted = config.combinations == "any" or held_out(scene) == (config.combinations == "unseen")
        return wanted and taken.isdisjoint(combinations(scene))

    train = []
    for task, count in _shares(config.tasks, config.count).items():
        train.append([prompt for _, prompt in _draw(config, concepts, sizes, task, "train", count, learnable)])
    return _in_turn(train), _in_turn(test)


def _in_turn(lists: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    """One of each, then the next of each: the first ones of a set are then of all tasks."""
    return [prompt for row in itertools.zip_longest(*lists) for prompt in row if prompt is not None]


def _reserved(scene: Scene) -> bool:
    """Whether it is for those held out, of what pre-training did not see: half of it."""
    digest = lambda key: hashlib.blake2b(b"held out|" + "|".join(key).encode(), digest_size=4).digest()[0]
    return held_out(scene) and all(digest(key) % 2 for key in combinations(scene))


def _shares(tasks: Sequence[str], count: int) -> dict[str, int]:
    """{task: prompts of it}, so that each category has `count`."""
    groups = collections.defaultdict(list)
    for task in tasks:
        groups[TASKS[task].group].append(task)
    shares = {}
    for group in groups.values():
        for i, task in enumerate(group):
            shares[task] = count // len(group) + (i < count % len(group))
    return shares


def _draw(
    config: ScenePrompts,
    concepts: Sequence[Concept],
    sizes: Sequence[Bucket],
    task: str,
    split: str,
    count: int,
    accepted: Callable[[Scene], bool],
) -> list[tuple[Scene, Prompt]]:
    """`count` different prompts of a task; its kinds and the sizes take turns."""
    entropy = [config.seed, list(TASKS).index(task), split == "train"]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
    kinds, found, seen, rejected = TASKS[task].kinds, [], set(), 0
    while len(found) < count:
        number = len(found)
        kind, size = kinds[number % len(kinds)], sizes[number // len(kinds) % len(sizes)]
        scene = sample_scene(rng, concepts, size, "all", kind)
        words = _words(config, scene, rng)
        if words in seen or not fits(task, scene) or not accepted(scene):
            rejected += 1
            if rejected == _ATTEMPTS:
                raise LensError(
                    f"prompts scenes: only {number} of {count} different prompts of {task} in {split} with "
                    f"{config.concepts} concepts; ask for fewer, or for more concepts"
                )
            continue
        rejected = 0
        seen.add(words)
        found.append((scene, _prompt(f"{split}/{task}/{number:04d}", task, kind, words, scene)))
    return found


def _words(config: ScenePrompts, scene: Scene, rng: np.random.Generator) -> str:
    natural = rng.random() < config.natural
    return captions.natural(scene) if natural and config.language == "en" else captions.caption(scene, config.language)


def _prompt(id: str, task: str, kind: str, words: str, scene: Scene) -> Prompt:
    return Prompt(
        id=id,
        prompt=words,
        category=TASKS[task].group,
        subcategory=task,
        item=kind,
        dimensions=tuple(name for name, has in _DIMENSIONS.items() if has(scene)),
        texts=(scene.word.text,) if scene.word else (),
        scene=scene_json.to_json(scene),
    )


def _manifest(folder: Path, config: ScenePrompts, train: Sequence[Prompt], test: Sequence[Prompt]) -> dict[str, Any]:
    count = lambda names: dict(sorted(collections.Counter(names).items()))
    digest = lambda name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
    values = {
        "format": _FORMAT,
        "prompts": len(train),
        "sha256": digest("prompts.jsonl"),
        "categories": count(prompt.category for prompt in train),
        "settings": {k: v for k, v in dataclasses.asdict(config).items() if k not in _UNSAID},
    }
    if test:
        values |= {"held_out": len(test), "held_out_sha256": digest("held_out.jsonl")}
        values |= {"held_out_categories": count(prompt.category for prompt in test)}
    return values
