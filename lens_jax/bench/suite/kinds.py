"""What the device of this process is, for the parts."""

import jax

from lens_jax.bench.suite.case import Setting
from lens_jax.errors import LensError
from lens_jax.models import attention
from lens_jax.models.attention import Kernel


def check_device(setting: Setting) -> None:
    """LensError where only a CPU is seen, on which the release's sizes would measure nothing in time."""
    if setting.size != "tiny" and jax.default_backend() == "cpu":
        raise LensError("jax sees no accelerator here (the log says why); on a CPU give --size tiny")


def kernel_here(kernel: Kernel, dtype: str) -> Kernel:
    """The kernel that `auto` is here."""
    return attention.resolve(kernel, dtype, jax.default_backend())


def memory_limit() -> int | None:
    """Bytes that programs have on a device, or None where it does not tell (a CPU)."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
