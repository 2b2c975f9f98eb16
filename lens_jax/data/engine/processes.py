"""How the engine starts processes: from a small one that has imported what they need, and that ends with its run."""

import contextlib
import ctypes
import multiprocessing
import signal
import sys
from multiprocessing.context import BaseContext

_PR_SET_PDEATHSIG = 1
_PRELOADED = ["lens_jax.data.engine.worker", "lens_jax.data.engine.careful", "lens_jax.data.engine.readers"]


def context() -> BaseContext:
    """Of `multiprocessing`. A process is forked from one that has no threads and has loaded no model: importing anew
    what a worker needs takes a second, and many on a busy machine."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(_PRELOADED)
    return forkserver


def die_with_parent() -> None:
    """Let the kernel kill this process when the server that forked it ends, and so when its run does, however that is:
    else a decoder that hangs would stay for ever.

    Of Linux; elsewhere a process ends when it next speaks to its parent.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
