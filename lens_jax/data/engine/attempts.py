"""Runs of a unit that have not ended with a result: noted before they start, so that a death is noted too.

The notes are files of the unit, so they count across workers, machines and days.
"""

import contextlib
import os
import shutil
import time
from pathlib import Path


def count(folder: Path) -> int:
    """How many runs of a unit were started and have neither ended with a result nor been stopped on purpose."""
    with contextlib.suppress(FileNotFoundError):
        return len(os.listdir(folder))
    return 0


def note(folder: Path) -> Path:
    """The note of a run that starts now; no two processes get the same."""
    folder.mkdir(parents=True, exist_ok=True)
    number = count(folder) + 1
    while True:
        path = folder / f"{number:03d}"
        with contextlib.suppress(FileExistsError), open(path, "x") as file:
            file.write(f"{os.uname().nodename} {os.getpid()} {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n")
            return path
        number += 1


def last_words(folder: Path) -> str:
    """What is noted of the end of the last run, after a colon; nothing where nothing is."""
    for path in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            _, _, said = path.read_text(encoding="utf-8", errors="replace").partition("\n")
            if said.strip():
                return f": {said.strip().splitlines()[-1]:.300}"
    return ""


def clear(folder: Path) -> None:
    """Forget the runs of a unit: it has a result, or is to be tried as if for the first time."""
    shutil.rmtree(folder, ignore_errors=True)
