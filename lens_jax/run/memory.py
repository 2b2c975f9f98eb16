"""What a process takes, as its records say."""

import os
import resource
from pathlib import Path

import jax


def memory() -> dict[str, float]:
    """Gigabytes (1e9): most in use so far on the fullest device of this host, if devices tell; now in this process."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    on_device = {"device_memory_peak_gb": max(peaks) / 1e9} if peaks and None not in peaks else {}
    return {**on_device, "process_memory_gb": _resident_bytes() / 1e9}


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux: the most there was, which macOS gives in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
