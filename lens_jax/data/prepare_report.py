"""What `prepare` says: how far it is, what it made, and what it left out and why."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple
from pathlib import Path

from lens_jax.console import make_console
from lens_jax.data.buckets import Bucket
from lens_jax.data.index import NAME, SPLITS, load_index
from lens_jax.data.sources import folder
from lens_jax.errors import LensError

# In the index; how many of them are printed.
MAX_NAMED_FAILURES, _SHOWN_FAILURES = 1000, 3


class LeftOut:
    """What could not be used, counted; the first are named."""

    def __init__(self, path: str, strict: bool):
        """Of the folder `path`; with `strict` the first one is a LensError."""
        self._path, self._strict = path, strict
        self.reasons: Counter[str] = Counter()
        self.by_bucket: dict[str, Counter[str]] = defaultdict(Counter)
        self.named: list[dict[str, str]] = []

    def add(self, problem: folder.Problem, bucket: Bucket | None = None) -> None:
        """Count a problem, and that of an image that would have been of a bucket with it."""
        problem = folder.Problem(*map(_plain_line, astuple(problem)))
        if self._strict:
            raise LensError(f"{self._path}: {problem}; without --strict such files are left out")
        self.reasons[problem.reason] += 1
        if bucket:
            self.by_bucket[str(bucket)][problem.reason] += 1
        if len(self.named) < MAX_NAMED_FAILURES:
            self.named.append({"file": problem.name, "reason": problem.reason, "detail": problem.detail})

    def summary(self, images: int) -> str:
        """Why nothing is left of so many images."""
        if not self.reasons:
            none = f"no images in it; accepted are {', '.join(folder.SUFFIXES)}"
            return "all images are in the validation split" if images else none
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        first = self.named[0]
        return f"nothing left to train on: {reasons}; {first['file']}: {first['detail'] or first['reason']}"


def _plain_line(text: str) -> str:
    """What is stored is UTF-8, and what is printed one line; names of files and columns need be neither."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def plain(config) -> dict:
    """A config as JSON has it."""
    # A path need not be UTF-8; what is stored must be.
    text = json.dumps(asdict(config), ensure_ascii=False).encode("utf-8", "replace")
    return json.loads(text)


def progress(items: Iterable, total: int | None, what: str, show: bool) -> Iterator:
    """Passes items on, with a bar that shows the rate and the time left."""
    if not show:
        yield from items
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]}")
    with Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()) as bar:
        task = bar.add_task(what, total=total, rate="")
        for item in items:
            yield item
            speed = bar.tasks[0].speed
            bar.update(task, advance=1, rate=f"{speed:,.0f}/s" if speed else "")


def report(out: str, show: bool) -> Path:
    """A table of the finished data set; returns its path."""
    data = load_index(out)
    if show:
        from rich.table import Table
        from rich.text import Text

        # As they are: a path may have brackets, which would be taken for styles.
        table = Table(title=Text(f"{out}: {data.source}, {data.licence}"))
        table.add_column("bucket (HxW)")
        for column in (*SPLITS, "too small"):
            table.add_column(column, justify="right")
        counts = [data.counts(split) for split in SPLITS]
        for index, bucket in enumerate(data.buckets):
            small = data.dropped_by_bucket.get(str(bucket), {}).get("too small", 0)
            table.add_row(str(bucket), *(f"{c[index]:,}" for c in counts), f"{small:,}")
        console = make_console()
        console.print(table)
        for reason, count in sorted(data.dropped.items()):
            console.print(f"left out: {count:,} {reason}", markup=False)
        for entry in data.failed[:_SHOWN_FAILURES]:
            console.print(f"  {entry['file']}: {entry['detail'] or entry['reason']}", markup=False)
        if data.failed:
            console.print(f'named in {Path(out) / NAME} under "failed"', markup=False)
        if data.config.get("validation") and not sum(data.counts("validation")):
            console.print(
                "no record is in the validation split: train with --validation.every 0, or raise --validation"
            )
    return Path(out)
