"""`lens-jax prompts make`: a prompt set in the manner of the report's Lens-RL-8K, written by a language model."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lens_jax.atomic import check_writable, write_json
from lens_jax.console import make_console
from lens_jax.errors import LensError
from lens_jax.llm.client import Client
from lens_jax.llm.endpoint import Endpoint
from lens_jax.posttraining.prompts import writer
from lens_jax.posttraining.prompts.duplicates import find_duplicates
from lens_jax.posttraining.prompts.prompt import Prompt, write_prompts
from lens_jax.posttraining.prompts.taxonomy import PACKAGED, Task, make_tasks, read_taxonomy

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class MakePrompts:
    """Write a set of prompts with rubrics, by a language model. Stopped, the same command goes on."""

    # Folder of the set: prompts.jsonl, dropped.jsonl, manifest.json, and the model's answers in answers/.
    out: str = "data/prompts"
    # The model that writes.
    endpoint: Endpoint = Endpoint()
    # TOML file of what prompts are about; empty is the one that comes with the package, of 1,180 items.
    taxonomy: str = ""
    # Prompts of each item. The report has 8,406 items and one prompt of each; of the packaged ones 7 make 8,260.
    per_item: int = 1
    # Only the first so many prompts, spread over all categories, to see what a model writes; 0 is all.
    limit: int = 0
    # Draws the dimensions of each prompt.
    seed: int = 0
    # None leaves it to the model; 0 makes prompts of like subjects alike.
    temperature: float | None = 0.8
    # Longest answer, with the reasoning of a model that reasons.
    max_tokens: int = 2000
    # Times that an answer is asked for until it is one.
    asks: int = 3
    # Share of the prompts that may end unwritten; when more do, this stops.
    max_failed: float = 0.2
    # Say how many calls and tokens it takes, and ask nothing.
    dry_run: bool = False
    # Replace a set that was made with other settings.
    overwrite: bool = False

    def __post_init__(self):
        if self.per_item < 1 or self.asks < 1 or self.max_tokens < 1 or self.limit < 0:
            raise LensError("prompts make: per_item, asks and max_tokens must be at least 1, limit at least 0")
        if not 0 <= self.max_failed <= 1:
            raise LensError(f"prompts make: max_failed is {self.max_failed}; it is a share, from 0 to 1")


def make_prompts(config: MakePrompts, console: Console | None = None) -> Path:
    """Write the set; the folder. What was answered is in its `answers`, so nothing is asked twice."""
    console = console or make_console()
    tasks = plan_tasks(config)
    if config.dry_run:
        _say_costs(config, tasks, console)
        return Path(config.out)
    out = Path(config.out)
    check_writable(out)
    settings = _settings(config)
    if not config.overwrite and _is_complete(out, settings):
        console.print(f"{out}: complete already")
        return out
    endpoint = config.endpoint
    if not endpoint.cache:
        endpoint = dataclasses.replace(endpoint, cache=str(out / "answers"))
    client = Client(endpoint, "writing prompts")
    try:
        client.check()
        prompts, dropped = _write(client, config, tasks, console)
        usd, tokens = client.spent
    finally:
        client.close()
    write_prompts(out / "prompts.jsonl", prompts)
    _write_dropped(out / "dropped.jsonl", dropped)
    write_json(out / "manifest.json", _manifest(out, settings, prompts, dropped, {"usd": usd, "tokens": tokens}))
    reasons = collections.Counter(
        "duplicate" if "duplicate" in reason else "not written" for reason in dropped.values()
    )
    told = "".join(f", {count} {reason}" for reason, count in sorted(reasons.items()))
    console.print(f"{len(prompts)} prompts in {out / 'prompts.jsonl'}{told}; {tokens:,} tokens, {usd:.2f} USD in all")
    return out


def plan_tasks(config: MakePrompts) -> list[Task]:
    """The prompts to be written. `limit` takes the first of every category in turn."""
    tasks = make_tasks(read_taxonomy(config.taxonomy or PACKAGED), config.per_item, config.seed)
    if not config.limit:
        return tasks
    turn: collections.Counter[str] = collections.Counter()
    ranked = []
    for i, task in enumerate(tasks):
        ranked.append((turn[task.item.category], i))
        turn[task.item.category] += 1
    return [tasks[i] for i in sorted(i for _, i in sorted(ranked)[: config.limit])]


def _write(client: Client, config: MakePrompts, tasks: Sequence[Task], console: Console):
    """The prompts in the order of the tasks, and {id: reason} of those that there are none of."""
    failures = _Failures(len(tasks), config.max_failed)
    with _progress(console) as progress:

        def stage(name: str, things: Sequence, request: Callable, read: Callable) -> list:
            """What was read for each thing, None where nothing was."""
            requests = (request(thing, config.max_tokens, config.temperature) for thing in things)
            found: list[Any] = [None] * len(things)
            bar = progress.add_task(name, total=len(things))
            for i, result in client.ask_each(requests, lambda i, answer: read(things[i], answer), config.asks):
                found[i] = result.value
                if result.error is not None:
                    failures.add(names[i], result.error)
                progress.advance(bar)
            return found

        names = [task.id for task in tasks]
        written = dict(zip(names, stage("prompts", tasks, writer.prompt_request, writer.read_prompt)))
        written = {id: one for id, one in written.items() if one is not None}
        repeated = find_duplicates((id, one.prompt) for id, one in written.items())
        names = [id for id in written if id not in repeated]
        kept = [written[id] for id in names]
        rubrics = dict(zip(names, stage("rubrics", kept, writer.rubric_request, writer.read_rubrics)))
    prompts = [
        writer.finished(task, written[task.id], rubrics[task.id]) for task in tasks if rubrics.get(task.id) is not None
    ]
    dropped = failures.reasons | {id: f"duplicate of {other}" for id, other in repeated.items()}
    return prompts, {task.id: dropped[task.id] for task in tasks if task.id in dropped}


class _Failures:
    """Why prompts are missing; LensError as soon as too many are."""

    def __init__(self, total: int, most: float):
        self.reasons: dict[str, str] = {}
        self._total, self._most = total, most

    def add(self, id: str, reason: str) -> None:
        self.reasons[id] = reason
        if len(self.reasons) > self._most * self._total:
            common, times = collections.Counter(self.reasons.values()).most_common(1)[0]
            raise LensError(
                f"prompts make: {len(self.reasons)} of {self._total} prompts could not be written, more than "
                f"--max-failed {self._most:g} allows; {times} of them: {common}. What was answered is kept"
            )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn(),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip


class _Rate(TextColumn):
    """Answers a second."""

    def __init__(self):
        super().__init__("")

    def render(self, task):
        return f"{task.finished_speed or task.speed or 0:.1f}/s"


def _settings(config: MakePrompts) -> dict[str, Any]:
    """What the set follows from, but for what the model says."""
    taxonomy = Path(config.taxonomy or PACKAGED).read_bytes()
    return {
        "writer": writer.VERSION,
        "model": config.endpoint.model,
        "arguments": config.endpoint.arguments,
        "taxonomy": hashlib.sha256(taxonomy).hexdigest(),
        **{name: getattr(config, name) for name in ("per_item", "limit", "seed", "temperature", "max_tokens", "asks")},
    }


def _is_complete(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder has the set of these settings. LensError where it has another, or something not from here."""
    manifest = out / "manifest.json"
    if not manifest.exists():
        if (out / "prompts.jsonl").exists() and not (out / "answers").is_dir():
            raise LensError(f"{out / 'prompts.jsonl'}: there already, and not from here; choose another --out")
        return False
    try:
        old = json.loads(manifest.read_bytes())["settings"]
        other = [name for name in settings if old.get(name) != settings[name]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise LensError(f"{manifest}: damaged; pass --overwrite to make the set anew") from None
    if other:
        name = other[0]
        raise LensError(
            f"{out}: holds a set with {name} {old.get(name)!r:.40}, not {settings[name]!r:.40}; choose another --out, "
            "or pass --overwrite"
        )
    return True


def _manifest(
    out: Path, settings: dict, prompts: Sequence[Prompt], dropped: dict[str, str], spent: dict
) -> dict[str, Any]:
    count = lambda names: dict(sorted(collections.Counter(names).items()))
    return {
        "format": _FORMAT,
        "prompts": len(prompts),
        "sha256": hashlib.sha256((out / "prompts.jsonl").read_bytes()).hexdigest(),
        "dropped": len(dropped),
        "categories": count(prompt.category for prompt in prompts),
        "dimensions": count(name for prompt in prompts for name in prompt.dimensions),
        "families": count(rubric.family for prompt in prompts for rubric in prompt.rubrics),
        "with_texts": sum(bool(prompt.texts) for prompt in prompts),
        "spent": spent,
        "settings": settings,
    }


def _write_dropped(path: Path, dropped: dict[str, str]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    lines = [json.dumps({"id": id, "reason": reason}, ensure_ascii=False) + "\n" for id, reason in dropped.items()]
    try:
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise LensError(f"{path}: cannot be written: {error.strerror}") from None


def _say_costs(config: MakePrompts, tasks: Sequence[Task], console: Console) -> None:
    """Calls and tokens before the first call: two calls a prompt; a token has about four letters of English."""
    blank = writer.Written("x " * writer.WORDS[1] * 3, ())
    letters = lambda request: sum(len(part) for message in request.messages for part in message.parts)
    prompts = sum(letters(writer.prompt_request(task, 1, None)) for task in tasks)
    rubrics = len(tasks) * letters(writer.rubric_request(blank, 1, None))
    tokens_in, tokens_out = (prompts + rubrics) // 4, len(tasks) * (100 + 400)
    price_in, price_out = config.endpoint.usd_per_million
    usd = (tokens_in * price_in + tokens_out * price_out) / 1e6
    cost = f", about {usd:.2f} USD" if usd else "; give --endpoint.usd-per-million IN OUT for the cost"
    console.print(
        f"{len(tasks)} prompts: {2 * len(tasks)} calls, about {tokens_in:,} tokens in and {tokens_out:,} out{cost}. "
        "Nothing was asked"
    )
