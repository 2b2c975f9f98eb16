"""What the environment says to libc and to JAX: settled before either of them has read it, or explained."""

import os
import sys
import traceback
from collections.abc import MutableMapping

from lens_jax.errors import LensError

# Huge pages (glibc 2.35 and later; others ignore it). XLA takes the memory for a program's values anew in every call:
# 27,000 page faults in a training step of the quickstart. What that costs differs: docs/benchmarks.md.
_TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def settle() -> None:
    """On Linux, start this process over with what it lacks of it: libc reads its settings only once.

    It stays the same process for whoever started it, and what is set already stays as it is.
    """
    if sys.platform == "linux" and not _TUNABLES.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], _TUNABLES | os.environ)


def drop_x64(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Take JAX_ENABLE_X64 out of the environment, before JAX is imported; whether it asked for 64 bits.

    Every dtype here is meant; 64-bit defaults would change the numbers that are drawn, and with them a run's losses.
    """
    return environ.pop("JAX_ENABLE_X64", "").lower() not in ("", "0", "false", "no", "off", "n", "f")


def explain_backend(error: Exception) -> LensError | None:
    """What to do where JAX_PLATFORMS names devices that are not there; None for an error from elsewhere."""
    frames = traceback.extract_tb(error.__traceback__)
    if not any(frame.filename.endswith("xla_bridge.py") for frame in frames):
        return None
    asked = os.environ.get("JAX_PLATFORMS", "")
    reason = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS=")[0][:200] or "there is none"
    return LensError(
        f"JAX_PLATFORMS is {asked!r}, which JAX cannot use here: {reason}; unset it to take what there is, or "
        'pip install "lens-jax[cuda]" for NVIDIA GPUs, "lens-jax[tpu]" for TPUs'
    )
