"""`lens-jax bench convert`: a release's denoiser to our layout, beside `cp` of the same folder on the same disk."""

import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lens_jax.bench import measure
from lens_jax.bench.sizes import SIZES, Size
from lens_jax.convert import denoiser, release, writer
from lens_jax.convert.table import Spec, Tensors
from lens_jax.errors import LensError


@dataclasses.dataclass(frozen=True)
class ConvertBench:
    """`lens-jax convert to-jax` of a made-up release with the denoiser alone, in turn with `cp -r`."""

    # lens is 16.4 GB of float32 in two shards, and takes three times that on the disk.
    size: Size = "toy"
    # Where to work; what is written there is deleted in the end. By default the folder for temporary files.
    folder: str = ""
    # Timed runs of each; the median is reported.
    repeats: int = 3
    # Read everything back and compare it, in the same time.
    verify: bool = False
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "repeats")


def bench_convert(bench: ConvertBench) -> dict:
    """Write a release of random values, convert and copy it in turn as programs of their own; return the figures."""
    model = dataclasses.replace(SIZES[bench.size].denoiser, param_dtype="float32")
    try:
        with tempfile.TemporaryDirectory(prefix="lens-jax-bench-", dir=bench.folder or None) as folder:
            return _bench_convert(bench, model, Path(folder))
    except OSError as error:
        raise LensError(f"{bench.folder or tempfile.gettempdir()}: {error.strerror or error}") from None


def _bench_convert(bench: ConvertBench, model, folder: Path) -> dict:
    source, target = folder / "release", folder / "out"
    total = _write_release(source, model)

    def fresh(command: list[str]) -> Callable[[], None]:
        def run() -> None:
            done = subprocess.run([*command, str(source), str(target)], capture_output=True, text=True)
            if done.returncode:
                raise LensError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-300:]}")

        return run

    convert = [
        sys.executable,
        "-m",
        "lens_jax",
        "convert",
        "to-jax",
        "--variant",
        "base",
        *(["--verify"] if bench.verify else []),
    ]
    runs = {"copy": fresh(["cp", "-r"]), "convert": fresh(convert)}
    seconds = {name: [] for name in runs}
    for _ in range(bench.repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
            # Outside the time: what a run leaves would fill the disk and the cache of the next.
            shutil.rmtree(target)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    result = {
        "gigabytes": total / 1e9,
        "verify": bench.verify,
        "copy_seconds": medians["copy"],
        "convert_seconds": medians["convert"],
        "ratio_to_copy": medians["convert"] / medians["copy"],
        "ratios": ", ".join(f"{a / b:.2f}" for a, b in zip(seconds["convert"], seconds["copy"])),
        "convert_gigabytes_per_second": total / 1e9 / medians["convert"],
        # Of the largest of all programs that were run, which is the conversion; mapped files count where they are read.
        "peak_megabytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3,
    }
    return measure.report(bench, result)


def _write_release(folder: Path, model) -> int:
    """A release folder with a denoiser of made-up values; returns its bytes."""
    rules = denoiser.rules(model)
    specs = {rule.name: Spec(np.dtype(np.float32), rule.shape) for rule in rules}
    rng = np.random.default_rng(0)
    make = lambda name: rng.standard_normal(specs[name].shape, np.float32)
    writer.write_folder(folder / "transformer", Tensors(specs, make))
    config = denoiser.config_to_release(model, tuple(range(model.text_layers)))
    (folder / "transformer" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / release.INDEX).write_text(json.dumps({"_class_name": "LensPipeline"}), encoding="utf-8")
    return sum(spec.bytes for spec in specs.values())
