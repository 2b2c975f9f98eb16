"""`lens-jax convert`: release folders to our layout, and back."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import tyro
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lens_jax.console import make_console
from lens_jax.convert import native
from lens_jax.convert.folder import open_component
from lens_jax.errors import LensError


@dataclasses.dataclass(frozen=True)
class ToJax:
    """Convert a release folder to our layout: the same numbers under the paths of our parameter trees."""

    # A folder with model_index.json, transformer/, vae/, text_encoder/; the original or one of its mirrors.
    src: tyro.conf.Positional[str]
    # The folder to write; it must not be there.
    dst: tyro.conf.Positional[str]
    # Which of the three it is, for default steps and guidance; guessed from the folder's name when not given.
    variant: Literal["lens", "turbo", "base"] | None = None
    # Read everything back and compare it, bit for bit, with the source.
    verify: bool = False


@dataclasses.dataclass(frozen=True)
class ToTorch:
    """Write a release folder from our layout, or the `transformer/` of one from a training run."""

    # A folder in our layout, or a run or one of its checkpoints.
    src: tyro.conf.Positional[str]
    # The folder to write; it must not be there.
    dst: tyro.conf.Positional[str]
    # Of the denoiser; by default what it has.
    dtype: Literal["f32", "bf16"] | None = None
    # Of a run: the moving average of the parameters (--no-ema: the parameters themselves).
    ema: bool = True
    # One file a component, whatever its size.
    single_file: bool = False


def to_jax(config: ToJax) -> None:
    """Convert, and verify if asked to; says what was written."""
    source, target = Path(config.src), Path(config.dst)
    sizes = [source / c.theirs for c in native.COMPONENTS if (source / c.theirs / "config.json").is_file()]
    total = sum(spec.bytes for folder in sizes for spec in open_component(folder).specs.values())
    with _progress("converting", total) as advance:
        found = native.to_jax(source, target, config.variant, advance)
    console = make_console()
    console.print(f"{', '.join(c.ours for c in found)} in {target}")
    if config.verify:
        with _progress("verifying", total) as advance:
            compared = native.verify(source, target, advance)
        console.print(f"{compared:,} tensors compared with {source}: all equal to the bit")


def to_torch(config: ToTorch) -> None:
    """Convert; says what was written."""
    source, target = Path(config.src), Path(config.dst)
    if not source.is_dir():
        raise LensError(f"{source}: no such folder; give one in our layout (lens.json), or a run")
    with _progress("converting", None) as advance:
        written = native.to_torch(source, target, config.dtype, config.ema, config.single_file, advance)
    make_console().print(f"{', '.join(written)} in {target}")


@contextlib.contextmanager
def _progress(title: str, total: int | None) -> Iterator[native.Progress]:
    columns = TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    console = make_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda name, count: progress.advance(task, count)
