"""`lens-jax evaluate --bench scenes`: does an image show what its prompt asks for?

Prompts are scenes with combinations that training never saw (`checker/tasks.py`). Images are read back from their
pixels (`checker/look.py`) and judged one criterion at a time (`checker/verdict.py`). Shares come with Wilson's 95 %
intervals.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lens_jax.atomic import check_writable
from lens_jax.checker.classifier import SceneClassifier, fit_classifier
from lens_jax.checker.look import Seen, look
from lens_jax.checker.references import References, load_references
from lens_jax.checker.tasks import TASKS, BenchPrompt, bench_prompts, lacks
from lens_jax.checker.verdict import CRITERIA, verdict
from lens_jax.console import make_console
from lens_jax.contact_sheet import contact_sheet
from lens_jax.data import captions, phrases, scene_json, scenes
from lens_jax.data.buckets import Bucket, make_buckets, parse_buckets
from lens_jax.data.index import load_index
from lens_jax.data.sources import openmoji
from lens_jax.errors import LensError, nearest
from lens_jax.evaluation import diversity
from lens_jax.evaluation.config import EvaluateConfig
from lens_jax.evaluation.drawing import drawn_with, open_pipeline
from lens_jax.evaluation.scene_page import scene_page

# Ratios of the small model's sizes, at about 64 x 64 pixels.
_RATIOS = ("1:1", "3:4", "4:3", "2:3", "3:2")
_PER_ROW = 12


@dataclass(frozen=True)
class Judged:
    """One image of the benchmark."""

    prompt: BenchPrompt
    language: str
    caption: str
    # uint8 [H, W, 3].
    image: np.ndarray
    seen: Seen
    # By those of CRITERIA that the scene has.
    verdicts: dict[str, bool]
    # Whether `checker/classifier.py`, which sees by other means, finds the same concepts; None where there are none.
    second: bool | None = None

    @property
    def right(self) -> bool:
        """Whether it meets the criteria of its task."""
        return all(self.verdicts.get(name, True) for name in TASKS[self.prompt.task].criteria)

    @property
    def all_right(self) -> bool:
        """Whether it meets every criterion, of its task or not."""
        return all(self.verdicts.values())


def run(config: EvaluateConfig, console: Console | None = None) -> list[Judged]:
    """Draw and judge the benchmark, print a table, and write figures, sheet and page."""
    console = console or make_console()
    check_writable(config.folder)
    count, buckets, languages = _what(config)
    tasks = config.tasks or tuple(TASKS)
    for task in tasks:
        if task not in TASKS:
            raise LensError(f"--tasks {task!r}{nearest(task, TASKS)}; accepted: {', '.join(TASKS)}")
    if config.count < 1:
        raise LensError(f"--count {config.count}: at least 1")
    concepts = openmoji.load_concepts(count)
    lacking = {task: needed for task in tasks if (needed := lacks(task, concepts))}
    for task, needed in lacking.items():
        if config.tasks:
            raise LensError(f"--tasks {task}: needs {needed}; the data set has {count} concepts")
        console.print(f"without the task {task}: it needs {needed}; the data set has {count} concepts")
    tasks = tuple(task for task in tasks if task not in lacking)
    pipe = open_pipeline(config)
    references = load_references(count)
    prompts = bench_prompts(concepts, buckets, tasks, config.count, config.seed)

    judged: list[Judged] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("fitting the second opinion")
        show = lambda done, total: progress.update(bar, completed=done, total=total)
        classifier = fit_classifier(concepts, scenes.sprite_cache(references.masters), progress=show)
        bar = progress.add_task("drawing and judging", total=2 * len(prompts) * len(languages))
        for language in languages:
            for bucket in buckets:
                chosen = [prompt for prompt in prompts if prompt.scene.bucket == bucket]
                texts = [captions.caption(prompt.scene, language) for prompt in chosen]
                done = progress.tasks[bar].completed
                show = lambda drawn, _, done=done: progress.update(bar, completed=done + drawn)
                images = pipe(
                    texts,
                    height=bucket.height,
                    width=bucket.width,
                    seed=config.seed,
                    progress=show,
                ).images
                for row in zip(chosen, texts, images):
                    judged.append(judged_image(*row, language, references, classifier))
                    progress.advance(bar)
        asked = diversity.spread(prompts, config.diversity_prompts, buckets[0])
        bar = progress.add_task("drawing prompts again", total=diversity.count(asked, config.diversity_images))
        advance = lambda images: progress.advance(bar, images)
        differ = diversity.measure(pipe, asked, languages[0], config.diversity_images, config.seed, advance)

    out = Path(config.folder)
    if (out / "scenes.json").exists():
        console.print(f"replacing the report that was in {out}")
    _write(out, config, drawn_with(pipe), buckets, judged, differ)
    _print(console, drawn_with(pipe), judged, differ, out)
    return judged


def judged_image(
    prompt: BenchPrompt,
    caption: str,
    image,
    language: str,
    references: References,
    classifier: SceneClassifier | None = None,
) -> Judged:
    """An image, a PIL one or uint8 [H, W, 3], read and judged by its prompt."""
    pixels = np.asarray(image)
    seen = look(pixels, references)
    second = classifier.agrees(prompt.scene, pixels) if classifier and prompt.scene.objects else None
    return Judged(prompt, language, caption, pixels, seen, verdict(prompt.scene, seen), second)


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.959964
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def scores(judged: Sequence[Judged]) -> dict:
    """Shares of right images, by task and in all, each criterion, size and language."""
    share = lambda values: {
        "right": sum(values),
        "total": len(values),
        "share": sum(values) / len(values),
        "interval": wilson(sum(values), len(values)),
    }
    groups = {"task": {}, "group": {}, "criterion": {}, "size": {}, "language": {}}
    add = lambda kind, key, value: groups[kind].setdefault(key, []).append(value)
    by_task: dict[str, dict] = {}
    for one in judged:
        task = one.prompt.task
        add("task", task, one.right)
        add("group", TASKS[task].group, one.right)
        add("size", str(one.prompt.scene.bucket), one.right)
        add("language", one.language, one.right)
        rows = by_task.setdefault(task, {})
        rows.setdefault("everything", []).append(one.all_right)
        for name, value in one.verdicts.items():
            add("criterion", name, value)
            rows.setdefault(name, []).append(value)
    result = {kind: {key: share(values) for key, values in group.items()} for kind, group in groups.items()}
    result["criterion"] = {name: result["criterion"][name] for name in CRITERIA if name in result["criterion"]}
    result["criteria by task"] = {
        task: {name: share(values) for name, values in rows.items()} for task, rows in by_task.items()
    }
    result["all"] = share([one.right for one in judged])
    result["everything"] = share([one.all_right for one in judged])
    both = [(one.verdicts["objects"], one.second) for one in judged if one.second is not None]
    if both:
        result["second opinion"] = share([second for _, second in both])
        result["objects there"] = share([first for first, _ in both])
        result["objects without the second opinion"] = share([first and not second for first, second in both])
    # As GenEval: every group of tasks counts alike.
    result["mean of groups"] = sum(row["share"] for row in result["group"].values()) / len(result["group"])
    return result


def _what(config: EvaluateConfig) -> tuple[int, tuple[Bucket, ...], tuple[str, ...]]:
    """How many concepts, which sizes, which languages."""
    if config.data:
        index = load_index(config.data)
        if index.source != "openmoji":
            raise LensError(f"{config.data}: evaluation needs pictograms, this data set is of source {index.source!r}")
        count, buckets = int(index.config["concepts"]), tuple(index.buckets)
        languages = config.languages or (*index.languages, *index.holdout_languages)
    else:
        count, buckets = len(openmoji.CONCEPTS), make_buckets(64, _RATIOS, 8)
        languages = config.languages or ("en",)
    for language in languages:
        if language not in phrases.LANGUAGES:
            known = phrases.LANGUAGES
            raise LensError(f"--languages {language!r}{nearest(language, known)}; accepted: {', '.join(known)}")
    return count, parse_buckets(config.sizes) if config.sizes else buckets, languages


def _write(
    out: Path, config: EvaluateConfig, drawn: dict, buckets: Sequence[Bucket], judged: Sequence[Judged], differ: dict
) -> None:
    report = {
        "config": asdict(config),
        "drawn_with": drawn,
        "sizes": [str(bucket) for bucket in buckets],
        "scores": scores(judged),
        "diversity": {density: asdict(found) for density, found in differ.items()},
        "images": [
            {
                "task": one.prompt.task,
                "held_out": one.prompt.held_out,
                "scene": scene_json.to_json(one.prompt.scene),
                "language": one.language,
                "caption": one.caption,
                "right": one.right,
                "verdicts": one.verdicts,
                "second": one.second,
                "seen": asdict(one.seen),
            }
            for one in judged
        ],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("scenes.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n"),
            ("scenes.html", scene_page(judged, report["scores"], _of_what(config, drawn))),
        ):
            temporary = out / f"{name}.partial"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(out / name)
        temporary = out / "scenes.png.partial"
        _sheet(judged).save(temporary, format="PNG")
        temporary.replace(out / "scenes.png")
    except OSError as error:
        raise LensError(f"{out}: cannot be written: {error.strerror}") from None


def _of_what(config: EvaluateConfig, drawn: dict) -> str:
    """The model and how it was drawn, in a line."""
    variant = f", variant {config.variant}" if config.variant else ""
    how = f"{drawn['num_inference_steps']} steps at guidance {drawn['guidance_scale']:g}, seed {config.seed}"
    return f"{config.checkpoint}{variant}: {how}"


def _sheet(judged: Sequence[Judged]):
    """Rows of images by task, framed in green where right and in red where not."""
    rows, labels = [], []
    for task in dict.fromkeys(one.prompt.task for one in judged):
        those = [one for one in judged if one.prompt.task == task]
        rows.append([_framed(one.image, one.right) for one in those[:_PER_ROW]])
        labels.append(f"{task}: {sum(one.right for one in those)} of {len(those)} right")
    return contact_sheet(rows, labels)


def _framed(image: np.ndarray, right: bool) -> np.ndarray:
    framed = np.empty((image.shape[0] + 4, image.shape[1] + 4, 3), np.uint8)
    framed[:] = (20, 150, 60) if right else (215, 30, 40)
    framed[2:-2, 2:-2] = image
    return framed


def _print(console: Console, drawn: dict, judged: Sequence[Judged], differ: dict, out: Path) -> None:
    figures = scores(judged)
    console.print(
        f"drawn with {drawn['num_inference_steps']} steps at guidance {drawn['guidance_scale']:g}: "
        f"{drawn['network_passes']} passes through the network an image"
    )
    by_task = {**figures["task"], "all": figures["all"]}
    _print_table(console, "task", "images that show what their prompt asks for", by_task)
    # Every criterion counts in all the images whose prompt has it, whatever their task.
    criteria = {**figures["criterion"], "all of them": figures["everything"]}
    _print_table(console, "criterion", "by criterion, over all tasks", criteria)
    for kind in ("size", "language"):
        if len(figures[kind]) > 1:
            shares = ", ".join(f"{key} {100 * row['share']:.1f} %" for key, row in figures[kind].items())
            console.print(f"by {kind}: {shares}")
    if second := figures.get("second opinion"):
        first, alone = figures["objects there"], figures["objects without the second opinion"]
        console.print(
            f"second opinion on the objects: right in {100 * second['share']:.1f} %, where the checker says "
            f"{100 * first['share']:.1f} %; {100 * alone['share']:.1f} % are right for the checker alone"
        )
    console.print(f"mean of the groups of tasks {100 * figures['mean of groups']:.1f} %")
    for density, found in differ.items():
        error = "" if found.error is None else f" +- {found.error:.4f}"
        console.print(
            f"images of one {density} prompt differ by {found.mean:.4f}{error} (root mean square of colours; "
            f"{len(found.by_prompt)} prompts, {found.images} images each)"
        )
    console.print(f"images in {out / 'scenes.png'}, one by one in {out / 'scenes.html'}, figures in scenes.json there")


def _print_table(console: Console, what: str, title: str, rows: dict[str, dict]) -> None:
    table = Table(title=title)
    table.add_column(what)
    for heading in ("right", "share", "95 % interval"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        low, high = (100 * end for end in row["interval"])
        table.add_row(name, f"{row['right']}/{row['total']}", f"{100 * row['share']:.1f} %", f"{low:.1f}-{high:.1f} %")
    console.print(table)
