"""A running stage on the terminal: units, rate, time left, and what becomes of images, by reason."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lens_jax.console import make_console
from lens_jax.data.engine.outcomes import OK, describe, lost
from lens_jax.data.engine.supervisor import Progress as StageProgress

# A terminal is redrawn; a log has a line now and then.
_LOG_EVERY = 30.0


@contextlib.contextmanager
def live(progress: StageProgress, show: bool) -> Iterator[Callable[[StageProgress], None]]:
    """A function that shows the progress of a stage, on stderr: a bar in a terminal, else a line each half minute."""
    console = make_console(stderr=True)
    if not show:
        yield lambda progress: None
        return
    if not console.is_terminal:
        last = time.monotonic()

        def log(progress: StageProgress) -> None:
            nonlocal last
            if time.monotonic() - last > _LOG_EVERY:
                last = time.monotonic()
                console.print(f"{progress.stage}: {progress.done} of {progress.units} units, {line(progress)}")

        yield log
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("units"),
        TimeRemainingColumn(),
        # A unit may be named `a[/b]`: not to be taken for the colours of rich.
        TextColumn("{task.fields[line]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(progress.stage, total=progress.units, completed=progress.done, line="")

        def refresh(progress: StageProgress) -> None:
            bar.update(task, completed=progress.done, line=line(progress))

        yield refresh


def line(progress: StageProgress) -> str:
    """One line on a stage: its rate, losses and troubles."""
    # A unit of the stage `write` may take half an hour.
    under_way = sum(images for _, images, _, _ in progress.working)
    rate = (progress.images + under_way) / max(time.monotonic() - progress.started, 1e-9)
    rate_of = f"{rate:,.0f} a second" if rate >= 10 else f"{rate:.2g} a second"
    parts = [f"{sum(counts.get(OK, 0) for counts in progress.counts.values()):,} images"]
    if progress.images:
        parts.append(rate_of)
    for source, counts in progress.counts.items():
        if lost(counts):
            parts.append(f"{source}: {describe(counts)}")
    if progress.restarts:
        parts.append(f"{progress.restarts} attempts failed")
    if progress.failed:
        parts.append(f"{len(progress.failed)} units failed")
    parts += [f"{unit} slow: {seconds:.0f} s" for unit, _, seconds, slow in progress.working if slow]
    if under_way:
        parts.append(f"{under_way:,} more under way" + ("" if progress.images else f", {rate_of}"))
    return ", ".join(parts)
