"""What libc must be told before a process starts, for speed on a CPU."""

import os
import sys

# Huge pages (glibc 2.35 and later; others ignore it). XLA takes the memory for a program's values anew in every call:
# 27,000 page faults in a training step of the quickstart. What that costs differs: docs/benchmarks.md.
_TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def settle() -> None:
    """On Linux, start this process over with what it lacks of it: libc reads its settings only once.

    It stays the same process for whoever started it, and what is set already stays as it is.
    """
    if sys.platform == "linux" and not _TUNABLES.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], _TUNABLES | os.environ)
