"""What must be set before a process starts, or before JAX does, for speed on a CPU.

Measured on two cores, the training step of the quickstart: 126 ms without, 113 ms with the fusions, 87 ms with both.
"""

import os
import sys
from collections.abc import Mapping, Sequence

# glibc asks for huge pages (2.35 and later; others ignore it). XLA takes the memory of a program's values anew in every
# call, and 27,000 page faults were a quarter of a step.
_TUNABLES = "glibc.malloc.hugetlb=1"
# XLA's CPU compiler computes both moments of a parameter in one pass, its update and the square of it in another. For
# training alone: the text encoder's experts would be unpacked side by side, which takes gigabytes more.
_XLA_OPTION = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
_TRAINING = (["train"], ["bench", "train"])


def settled(environ: Mapping[str, str], arguments: Sequence[str]) -> dict[str, str]:
    """`environ` with what `lens-jax ARGUMENTS` wants and is missing; what is set already stays as it is."""
    settled = {"GLIBC_TUNABLES": _TUNABLES, **environ}
    flags = settled.get("XLA_FLAGS", "")
    training = any(list(arguments[: len(words)]) == words for words in _TRAINING)
    if training and "xla_backend_extra_options" not in flags:
        settled["XLA_FLAGS"] = f"{_XLA_OPTION} {flags}".strip()
    return settled


def settle() -> None:
    """Set it for this process, which on Linux starts over for it: libc reads its settings only once."""
    wanted = settled(os.environ, sys.argv[1:])
    restart = sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ
    os.environ.update(wanted)
    if restart:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
