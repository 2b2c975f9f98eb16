"""`lens-jax prompts check` and `subset`: what a prompt set holds, whether it is whole, and parts of it."""

import collections
import dataclasses
import hashlib
import json
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from lens_jax.console import make_console
from lens_jax.errors import LensError
from lens_jax.posttraining.prompts.duplicates import normalised
from lens_jax.posttraining.prompts.prompt import Prompt, prompts_file, read_prompts, write_prompts
from lens_jax.posttraining.prompts.subset import subset
from lens_jax.posttraining.prompts.writer import MOST_RUBRICS, STRUCTURAL_INTEGRITY

# Remarks of a kind that are named.
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class CheckPrompts:
    """Say what a prompt set holds, and what in it looks wrong."""

    # A file of prompts, or the folder of a set.
    path: tyro.conf.Positional[str]
    # Take what looks wrong for an error.
    strict: bool = False


@dataclasses.dataclass(frozen=True)
class SubsetPrompts:
    """Write a part of a prompt set: the same part each time, and a smaller one within a larger one."""

    # A file of prompts, or the folder of a set.
    source: tyro.conf.Positional[str]
    # The file to write.
    out: tyro.conf.Positional[str]
    # Share of the prompts of each category; the report's ablation has 0.25 and 0.5.
    fraction: float = 1.0
    # Categories that are left out; the report's ablation leaves out "Text".
    without: tuple[str, ...] = ()
    # Draws which prompts these are.
    seed: int = 0


def check_prompts(config: CheckPrompts, console: Console | None = None) -> list[str]:
    """Print what is there; the remarks. LensError for a file that cannot be used, or with `strict` for any remark."""
    console = console or make_console()
    prompts = read_prompts(config.path)
    _check_manifest(prompts_file(config.path), len(prompts))
    _print(prompts, console)
    remarks = find_remarks(prompts)
    for kind, ids in remarks.items():
        more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
        console.print(f"{len(ids)} {kind}: {', '.join(ids[:_NAMED])}{more}")
    if config.strict and remarks:
        raise LensError(f"{config.path}: {'; '.join(f'{len(ids)} {kind}' for kind, ids in remarks.items())}")
    return list(remarks)


def find_remarks(prompts: list[Prompt]) -> dict[str, list[str]]:
    """{what looks wrong: ids of the prompts}. None of it keeps a set from being used."""
    remarks: dict[str, list[str]] = collections.defaultdict(list)
    seen: dict[tuple[str, ...], str] = {}
    for prompt in prompts:
        words = normalised(prompt.prompt)
        if words in seen:
            remarks["with the words of an earlier prompt"].append(f"{prompt.id} ({seen[words]})")
        seen.setdefault(words, prompt.id)
        if any(text not in prompt.prompt for text in prompt.texts):
            remarks["whose texts are not in the prompt"].append(prompt.id)
        if len(prompt.rubrics) > MOST_RUBRICS + 1:
            remarks[f"with more than {MOST_RUBRICS + 1} rubrics"].append(prompt.id)
        if prompt.rubrics and STRUCTURAL_INTEGRITY.family not in {rubric.family for rubric in prompt.rubrics}:
            remarks["without the rubric of structural integrity"].append(prompt.id)
        if not (prompt.rubrics or prompt.texts or prompt.scene):
            remarks["with neither rubrics nor texts nor a scene to judge by"].append(prompt.id)
        if not prompt.category:
            remarks["without a category"].append(prompt.id)
    return dict(remarks)


def subset_prompts(config: SubsetPrompts, console: Console | None = None) -> Path:
    """Write the part; the file."""
    prompts = read_prompts(config.source)
    part = subset(prompts, config.fraction, config.without, config.seed)
    out = Path(config.out)
    if out.exists():
        raise LensError(f"{out}: there already; choose another file")
    write_prompts(out, part)
    (console or make_console()).print(f"{len(part)} of {len(prompts)} prompts in {out}")
    return out


def _check_manifest(file: Path, count: int) -> None:
    """LensError where a manifest lies beside the file that is of another one."""
    manifest = file.with_name("manifest.json")
    if file.name != "prompts.jsonl" or not manifest.is_file():
        return
    try:
        values = json.loads(manifest.read_bytes())
        told, digest = values["prompts"], values["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise LensError(f"{manifest}: damaged; it should say how many prompts there are, and their sha256") from None
    if told != count or digest != hashlib.sha256(file.read_bytes()).hexdigest():
        raise LensError(
            f"{file}: {count} prompts that are not the {told!r:.20} of {manifest}: changed since it was made"
        )


def _print(prompts: list[Prompt], console: Console) -> None:
    table = Table(title=f"{len(prompts)} prompts")
    for heading in ("category", "prompts", "words", "rubrics", "with texts", "with a scene"):
        table.add_column(heading, justify="left" if heading == "category" else "right")
    groups = collections.defaultdict(list)
    for prompt in prompts:
        groups[prompt.category or "(none)"].append(prompt)
    mean = lambda numbers: f"{sum(numbers) / len(numbers):.1f}"
    for category, group in sorted(groups.items()):
        words, rubrics = [len(p.prompt.split()) for p in group], [len(p.rubrics) for p in group]
        texts, scenes = sum(bool(p.texts) for p in group), sum(p.scene is not None for p in group)
        table.add_row(category, str(len(group)), mean(words), mean(rubrics), str(texts), str(scenes))
    console.print(table)
    for what, names in {
        "dimensions": [name for prompt in prompts for name in prompt.dimensions],
        "rubrics": [rubric.family for prompt in prompts for rubric in prompt.rubrics],
    }.items():
        counts = collections.Counter(names).most_common(12)
        if counts:
            console.print(f"{what}: {', '.join(f'{name} {count}' for name, count in counts)}")
