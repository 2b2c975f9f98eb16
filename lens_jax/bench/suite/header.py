"""What the figures were measured with, found out without touching the device."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import lens_jax

_PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12",
    "nvidia-cublas", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy",
)  # fmt: skip
_FLAGS = ("XLA_", "LIBTPU_", "JAX_", "NVIDIA_", "CUDA_", "GLIBC_TUNABLES")


def header(environment: dict[str, str]) -> dict:
    """Hardware, driver, versions, flags of the `environment`, command and revision, as JSON values."""
    return {
        "accelerators": _said("nvidia-smi", f"--query-gpu={_GPU}", _CSV).splitlines(),
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", _CSV).partition("\n")[0],
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gigabytes": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "lens_jax": _version("lens-jax") or lens_jax.__version__,
        "revision": _revision(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "flags": {name: value for name, value in sorted(environment.items()) if name.startswith(_FLAGS)},
        "command": shlex.join(["lens-jax", *sys.argv[1:]]),
    }


_GPU = "name,memory.total,clocks.max.sm,power.limit"
_CSV = "--format=csv,noheader"


def _said(*command: str) -> str:
    """What a program says, or "" where there is none or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _revision() -> str:
    """The commit of the source tree that runs, and whether it was changed; "" for an installed package."""
    package = Path(lens_jax.__file__).parent
    git = ("git", "-C", str(package))
    if _said(*git, "rev-parse", "--show-prefix") != "lens_jax/":
        return ""
    changed = _said(*git, "status", "--porcelain", "--untracked-files=no")
    return _said(*git, "rev-parse", "HEAD") + (" with changes" if changed else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or sys.platform
