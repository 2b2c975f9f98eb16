"""A process starts over with what libc and XLA read early, and keeps what was set already."""

import os
import subprocess
import sys

import pytest

from lens_jax import environment

SHOW = "import os, sys; from lens_jax.environment import settle; settle(); " + (
    "print(os.environ.get('GLIBC_TUNABLES'), os.environ.get('XLA_FLAGS'), os.getpid(), *sys.argv[1:], sep='|')"
)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings are Linux's")
@pytest.mark.parametrize(
    ("command", "given", "tunables", "flags"),
    [
        (["sample"], {}, "glibc.malloc.hugetlb=1", "None"),
        (["train"], {}, "glibc.malloc.hugetlb=1", "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"),
        (
            ["bench", "train"],
            {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", "XLA_FLAGS": "--xla_dump_to=dump"},
            "glibc.malloc.hugetlb=0",
            "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion --xla_dump_to=dump",
        ),
        (
            ["train"],
            {"XLA_FLAGS": "--xla_backend_extra_options=xla_cpu_small_call"},
            "glibc.malloc.hugetlb=1",
            "--xla_backend_extra_options=xla_cpu_small_call",
        ),
    ],
)
def test_process_starts_over_with_its_arguments(command, given, tunables, flags):
    environ = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "XLA_FLAGS")}
    command = [sys.executable, "-c", SHOW, *command, "red apple", "--seed", "1"]
    process = subprocess.Popen(command, env=environ | given, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    # The same process: whoever started it can still signal it.
    assert output.strip().split("|") == [tunables, flags, str(process.pid), *command[3:]]


def test_the_compiler_takes_the_option(tmp_path):
    """An unknown flag would end the process; the option itself is used by what it was measured with."""
    environ = environment.settled({**os.environ, "XLA_FLAGS": ""}, ["train"])
    code = (
        "import jax; f = jax.jit(lambda x, y: (x + y, x * y, x - y)); s = jax.ShapeDtypeStruct((512, 512), 'float32');"
        "print(f.lower(s, s).compile().as_text())"
    )
    program = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    fusions = [line for line in program.stdout.splitlines() if " fusion(" in line]
    assert len(fusions) == 1
    assert fusions[0].count("f32[512,512]") >= 3
