"""What the device of this process is, for the parts."""

import jax

from lens_jax.models import attention
from lens_jax.models.attention import Kernel


def kernel_here(kernel: Kernel, dtype: str) -> Kernel:
    """The kernel that `auto` is here."""
    return attention.resolve(kernel, dtype, jax.default_backend())


def memory_limit() -> int | None:
    """Bytes that programs have on a device, or None where it does not tell (a CPU)."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
