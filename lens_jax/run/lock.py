"""One trainer a folder: a lock that the kernel gives back when its process ends, however it ends."""

import contextlib
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

from lens_jax.errors import LensError, LensWarning

NAME = ".lock"


@contextlib.contextmanager
def held(*folders: os.PathLike | str) -> Iterator[None]:
    """Process 0 of a run holds the folders while the block runs; LensError where another run holds one.

    A folder that is not there is made, and is removed if nothing was put into it. Addresses in an object store have no
    locks and are left out. On NFS the lock holds across hosts (NFSv4, or v3 with its lock daemon) unless it is mounted
    with `nolock` or `local_lock`; a file system without locks is warned of.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            for folder in dict.fromkeys(str(Path(f).absolute()) for f in folders if "://" not in str(f)):
                stack.enter_context(_held(Path(folder)))
        yield


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open(folder)
    except OSError as error:
        raise LensError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        # While it is held, so that nobody locks a file that is about to go.
        with contextlib.suppress(OSError):
            (folder / NAME).unlink()
        os.close(file)
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()


def _open(folder: Path) -> int:
    path = folder / NAME
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            os.close(file)
            raise LensError(
                f"{folder}: another trainer is at work in it{holder}; wait for it or stop it, or choose another folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{folder}: its file system has no locks ({error.strerror}); a second trainer in it is not noticed",
                LensWarning,
                stacklevel=2,
            )
        # The one who held it before may have removed it after we opened it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                break
        os.close(file)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now}).encode(), 0)
    return file


def _holder(file: int) -> str:
    try:
        told = json.loads(os.pread(file, 1000, 0))
        return f" (process {told['process']} on {told['host']} since {told['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
