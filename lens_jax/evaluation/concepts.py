"""`lens-jax evaluate`: is a sampled pictogram nearest, among all concepts' reference images, to its own?

For each concept and size the name is drawn once and compared, by mean squared pixel difference, with the reference
image of every concept at that size. The share of samples nearest to their own is reported by language; languages
that training never saw show what the text encoder carries over.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lens_jax.atomic import check_writable
from lens_jax.console import make_console
from lens_jax.contact_sheet import contact_sheet
from lens_jax.data import scene_sampler, scenes
from lens_jax.data.buckets import Bucket
from lens_jax.data.index import Index, load_index
from lens_jax.data.sources import openmoji
from lens_jax.errors import LensError, nearest
from lens_jax.evaluation.config import EvaluateConfig
from lens_jax.evaluation.drawing import drawn_with, open_pipeline
from lens_jax.inference.pipeline import LensPipeline


@dataclasses.dataclass(frozen=True)
class Score:
    """The result of one language."""

    language: str
    # Whether training had captions in it.
    trained: bool
    # Samples nearest to their own concept, and samples in all.
    correct: int
    total: int
    # prompt -> the concept it was nearest to, for those that were not nearest to their own.
    confused: dict[str, str]

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


def run(config: EvaluateConfig, console: Console | None = None) -> list[Score]:
    """Evaluate, print a table, and write `evaluation.json` and `evaluation.png`."""
    console = console or make_console()
    check_writable(config.folder)
    data = config.data or "data/openmoji"
    index = load_index(data)
    if index.source != "openmoji":
        raise LensError(f"{data}: evaluation needs pictograms, this data set is of source {index.source!r}")
    concepts = openmoji.load_concepts(int(index.config["concepts"]))
    languages = config.languages or (*index.languages, *index.holdout_languages)
    for language in languages:
        if language not in concepts[0].names:
            known = concepts[0].names
            raise LensError(f"--languages {language!r}{nearest(language, known)}; accepted: {', '.join(known)}")
    pipe = open_pipeline(config)
    references = reference_images(concepts, index.buckets)

    scores, rows = [], [[] for _ in concepts]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("sampling", total=len(languages) * len(index.buckets) * len(concepts))
        for language in languages:
            prompts = [concept.names[language] for concept in concepts]
            correct, confused = 0, {}
            for bucket in index.buckets:
                images = _draw(pipe, prompts, bucket, config.seed)
                found = nearest_reference(images, references[bucket])
                correct += int((found == np.arange(len(concepts))).sum())
                for i in np.flatnonzero(found != np.arange(len(concepts))):
                    confused[f"{prompts[i]} ({bucket})"] = concepts[found[i]].id
                if language == languages[0]:
                    for row, image in zip(rows, images):
                        row.append(image)
                progress.advance(task, len(concepts))
            total = len(concepts) * len(index.buckets)
            scores.append(Score(language, language in index.languages, correct, total, confused))

    out = Path(config.folder)
    _write(out, config, drawn_with(pipe), index, scores)
    contact_sheet(rows, [concept.names[languages[0]] for concept in concepts]).save(out / "evaluation.png")
    _print(console, scores, len(concepts), out)
    return scores


def reference_images(concepts, buckets: tuple[Bucket, ...]) -> dict[Bucket, np.ndarray]:
    """The canonical image of every concept at every size: uint8 [concepts, H, W, 3] by bucket."""
    longest = max(max(bucket.height, bucket.width) for bucket in buckets)
    sprite = scenes.sprite_cache(openmoji.load_sprites(concepts, 4 * longest))
    return {
        bucket: np.stack([scenes.draw(scene_sampler.reference_scene(concept, bucket), sprite) for concept in concepts])
        for bucket in buckets
    }


def nearest_reference(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """For each uint8 image [B, H, W, 3] the index of the reference [C, H, W, 3] of least mean squared difference."""
    flat, targets = (x.reshape(len(x), -1).astype(np.float64) for x in (images, references))
    return np.argmin(np.square(targets).sum(1) - 2 * flat @ targets.T, axis=1)


def _draw(pipe: LensPipeline, prompts: list[str], bucket: Bucket, seed: int) -> np.ndarray:
    images = pipe(prompts, height=bucket.height, width=bucket.width, seed=seed).images
    return np.stack([np.asarray(image) for image in images])


def _write(out: Path, config: EvaluateConfig, drawn: dict, index: Index, scores: list[Score]) -> None:
    report = {
        "config": dataclasses.asdict(config),
        "drawn_with": drawn,
        "concepts": int(index.config["concepts"]),
        "sizes": [str(bucket) for bucket in index.buckets],
        "scores": [{"accuracy": score.accuracy, **dataclasses.asdict(score)} for score in scores],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / "evaluation.json.partial"
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(out / "evaluation.json")
    except OSError as error:
        raise LensError(f"{out}: cannot be written: {error.strerror}") from None


def _print(console: Console, scores: list[Score], concepts: int, out: Path) -> None:
    table = Table(title=f"samples nearest to their own of {concepts} concepts")
    for heading in ("prompts in", "training saw it", "nearest to own", "share"):
        table.add_column(heading, justify="right" if heading in ("nearest to own", "share") else "left")
    groups = [("trained", True), ("held out", False)]
    for score in scores:
        share = f"{100 * score.accuracy:.1f} %"
        table.add_row(score.language, "yes" if score.trained else "no", f"{score.correct}/{score.total}", share)
    for name, trained in groups:
        chosen = [score for score in scores if score.trained == trained]
        if len(chosen) > 1:
            correct, total = sum(s.correct for s in chosen), sum(s.total for s in chosen)
            table.add_row(f"all {name}", "", f"{correct}/{total}", f"{100 * correct / total:.1f} %")
    console.print(table)
    console.print(f"images in {out / 'evaluation.png'}, figures in {out / 'evaluation.json'}")
