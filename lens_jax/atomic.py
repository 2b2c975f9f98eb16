"""Files and directories that appear whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lens_jax.errors import LensError

# No room, none left of a quota, too large for the file system, mounted to be read only.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def new_directory(out: str | os.PathLike, overwrite: bool, marker: str) -> Iterator[Path]:
    """Yields a temporary sibling of `out`, renamed to `out` when the block ends and removed when it fails.

    An existing `out` is refused, unless it is empty, or `overwrite` is set and it holds the file `marker` (so that
    a mistyped path never costs someone a folder of something else).
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        if not out.is_dir() or out.is_symlink():
            raise LensError(f"{out}: exists and is not a directory; choose another output path")
        if any(out.iterdir()):
            if not (out / marker).is_file():
                raise LensError(f"{out}: not empty, and not ours to replace (no {marker}); choose another output path")
            if not overwrite:
                raise LensError(f"{out}: there already; pass --overwrite to replace it, or choose another output path")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise LensError(f"{out}: cannot be created ({error.strerror or error})") from error
    try:
        with writing(out):
            yield partial
        if out.exists() and any(out.iterdir()):
            old = out.with_name(f".{out.name}.old-{os.getpid()}")
            os.rename(out, old)  # two renames: for an instant nothing is there, but never something half-written
            os.rename(partial, out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """A disk on which nothing more can be written, found in the block, is a LensError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise LensError(f"{path}: cannot be written: {error.strerror}") from error


def check_writable(folder: str | os.PathLike) -> None:
    """LensError where a folder, which need not be there, could not be written into: said before the work."""
    folder = Path(folder)
    place = folder
    while not (place.exists() or place.is_symlink()):
        place = place.parent
    if not place.is_dir():
        raise LensError(f"{folder}: cannot be written: {place} is not a folder")
    if place != folder and os.access(place, os.W_OK | os.X_OK):
        return
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise LensError(f"{folder}: cannot be written: {error.strerror or error}") from None


def write_text(path: str | os.PathLike, text: str) -> None:
    """A text as a file, in UTF-8; LensError where it cannot be written."""
    target = Path(path)
    # In the folder it goes to, which makes the rename atomic. Names of machine and process keep two that race apart.
    partial = target.with_name(f".{target.name}.partial-{os.uname().nodename}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except (OSError, UnicodeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise LensError(f"{path}: cannot be written: {getattr(error, 'strerror', '') or error}") from None


def write_json(path: str | os.PathLike, values: Any) -> None:
    """Plain values as a file; LensError where it cannot be written."""
    write_text(path, json.dumps(values, indent=2) + "\n")
