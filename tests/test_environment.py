"""A process starts over with what libc reads early, once, and keeps what was set already."""

import os
import subprocess
import sys

import pytest

from lens_jax.environment import drop_x64

SHOW = (
    "import os, sys; from lens_jax.environment import settle; settle();"
    "print(os.environ['GLIBC_TUNABLES'], os.getpid(), *sys.argv[1:], sep='|')"
)


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of Linux's libc")
@pytest.mark.parametrize(
    ("given", "tunables"),
    [({}, "glibc.malloc.hugetlb=1"), ({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, "glibc.malloc.check=1")],
)
def test_process_starts_over_with_its_arguments(given, tunables):
    environ = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | given
    command = [sys.executable, "-c", SHOW, "sample", "red apple", "--seed", "1"]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    # The same process: whoever started it can still signal it.
    assert output.strip().split("|") == [tunables, str(process.pid), "sample", "red apple", "--seed", "1"]


@pytest.mark.parametrize(("value", "asked"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_64_bits_are_not_taken(value, asked):
    environ = {"JAX_ENABLE_X64": value}
    assert drop_x64(environ) == asked
    assert environ == {}
    assert not drop_x64(environ)
