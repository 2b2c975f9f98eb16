"""What is said of captions: the forecast, the progress with what is spent, and the outcome."""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lens_jax.console import make_console
from lens_jax.data.engine.captions.config import Caption
from lens_jax.data.engine.captions.forecast import Forecast
from lens_jax.data.engine.outcomes import OK, describe, lost
from lens_jax.llm.client import Client

# A terminal is redrawn; a log has a line now and then.
_LOG_EVERY = 30.0


class Bar:
    """The images of a run, captioned or lost, with rate, time left, tokens and money."""

    def __init__(self, total: int):
        self._total, self._started = total, time.monotonic()
        self._console = make_console(stderr=True)
        self._told = time.monotonic()
        self.bar: Progress | None = None
        if self._console.is_terminal:
            columns = (
                TextColumn("captions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[line]}", markup=False),
            )  # fmt: skip
            self.bar = Progress(*columns, console=self._console, transient=True)
            self._task = self.bar.add_task("captions", total=total, line="")

    def update(self, counts: Mapping[str, int], clients: Sequence[Client]) -> None:
        """`counts` are of images by what became of them."""
        done = sum(counts.values())
        line = self._line(counts, clients)
        if self.bar is not None:
            self.bar.update(self._task, completed=done, line=line)
        elif time.monotonic() - self._told > _LOG_EVERY:
            self._told = time.monotonic()
            self._console.print(f"captions: {done:,} of {self._total:,} images, {line}")

    def _line(self, counts: Mapping[str, int], clients: Sequence[Client]) -> str:
        rate = sum(counts.values()) / max(time.monotonic() - self._started, 1e-9)
        parts = [f"{rate:.3g} a second"]
        found = [client.counts for client in clients]
        parts.append(f"{sum(each.tokens_in + each.tokens_out for each in found):,} tokens")
        if spent := sum(client.spent[0] for client in clients):
            parts.append(f"{spent:,.2f} USD")
        if waits := sum(each.retried for each in found):
            parts.append(f"{waits:,} calls made again")
        if lost(counts):
            parts.append(f"no caption: {describe(counts)}")
        return ", ".join(parts)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Bar]:
    """The bar while the block runs: on stderr, a line each half minute where that is no terminal."""
    bar = Bar(total)
    with bar.bar or contextlib.nullcontext():
        yield bar


def forecast(caption: Caption, total: Forecast, by_source: Mapping[str, Forecast]) -> None:
    """A table of what will be asked, and what it is based on."""
    console = make_console()
    table = Table("source", "images", "calls", "tokens in", "of images", "tokens out", "USD", box=box.SIMPLE)
    for name, sums in [*by_source.items(), ("all", total)]:
        usd = sums.usd(caption)
        numbers = (sums.images, sums.calls, round(sums.tokens_in), round(sums.image_tokens), round(sums.answer_tokens))
        table.add_row(Text(name), *(f"{number:,}" for number in numbers), "?" if usd is None else f"{usd:,.2f}")
    console.print(table)
    endpoint = caption.endpoint
    base, tile, side = caption.image_tokens
    console.print(
        f"{endpoint.model} at {endpoint.url}, {caption.mode}: an image taken for {base:g} tokens and {tile:g} for each "
        f"tile of {side} pixels, a dense answer for {caption.answer_tokens}; answers asked for again are not in it"
    )
    if not any(endpoint.usd_per_million):
        console.print("no price is built in: set caption.endpoint.usd_per_million to see what it costs")
    elif endpoint.max_usd:
        console.print(f"it stops before caption.endpoint.max_usd = {endpoint.max_usd:,g} USD")


def outcome(found) -> None:
    """What became of the images, an `Outcome`."""
    console = make_console()
    console.print(f"{found.counts[OK]:,} of {sum(found.counts.values()):,} images have captions")
    lines = {
        "no caption": Counter({name: count for name, count in found.counts.items() if name != OK}),
        "answers turned down": found.rejected,
        "answers put right": found.repaired,
    }
    for name, counts in lines.items():
        if text := describe(counts, most=20):
            console.print(f"{name}: {text}")
    if found.refused:
        console.print(
            f"refused by the first model: {found.refused:,}, of these captioned by the second {found.routed:,}"
        )
    if found.asked_again:
        console.print(f"in flight when a process was killed, and asked again: {found.asked_again:,}")
    if found.taken:
        console.print(f"{found.taken:,} units are asked about by another process; run this again when it has ended")


def sign_of_life(stage: str, options, units: int, done: int, rate: float, opened: Mapping) -> dict[str, object]:
    """What `data status` reads of a process that is at work."""
    return {
        "stage": stage, "host": options.host, "hosts": options.hosts, "machine": os.uname().nodename,
        "process": os.getpid(), "time": time.time(), "units": units, "done": done, "images_per_second": rate,
        "working": [[name, sum(unit.counts.values()), 0.0, False] for name, unit in opened.items()],
    }  # fmt: skip
