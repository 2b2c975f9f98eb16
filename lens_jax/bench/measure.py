"""How every benchmark is timed and reported: warm-up, repeats in turn, medians, shares of peak by exact counts."""

import contextlib
import dataclasses
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from lens_jax import flops
from lens_jax.console import make_console
from lens_jax.errors import LensError

# Libraries keep their threads spinning for some milliseconds after a call, which would slow the next one down.
_PAUSE_SECONDS = 0.05
# Random numbers that are drawn at a time.
_DRAWN_AT_ONCE = 2**24


def seconds_in_turn(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call of each run: all run once, then all again, so that a busy machine slows all alike.

    In each turn a run is called twice and the second call is timed, as in a loop that does nothing else: a first call
    pays for what ran before it, 15 % of a training step for whichever program came after a plain product.
    A run's result is waited for if it is of JAX; other libraries have to wait inside the run.
    """
    seconds = {name: [] for name in runs}
    for repeat in range(1 + repeats):
        for name, run in runs.items():
            if len(runs) > 1:
                time.sleep(_PAUSE_SECONDS)
                jax.block_until_ready(run())
            started = time.perf_counter()
            jax.block_until_ready(run())
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def medians(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each run, see `seconds_in_turn`."""
    return {name: statistics.median(values) for name, values in seconds_in_turn(runs, repeats).items()}


def compiled(function: Callable, *args, **options) -> tuple[Callable, dict[str, float]]:
    """`function` compiled for these arguments (arrays or shapes), and what that took; `options` are those of jax.jit.

    The figures: trace_seconds, compile_seconds (less where the compilation cache has the program), and what it needs in
    the device's memory while it runs: temporary_megabytes besides arguments and results, program_megabytes in all.
    """
    started = time.perf_counter()
    lowered = jax.jit(function, **options).lower(*args)
    traced = time.perf_counter()
    program = lowered.compile()
    figures = {"trace_seconds": traced - started, "compile_seconds": time.perf_counter() - traced}
    memory = program.memory_analysis()
    if memory is not None:  # some backends do not tell
        temporary, code = memory.temp_size_in_bytes, memory.generated_code_size_in_bytes
        whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        figures["temporary_megabytes"] = temporary / 1e6
        figures["program_megabytes"] = (whole + temporary + code) / 1e6
    return program, figures


def random_weights(abstract: Any, key: jax.Array) -> Any:
    """Arrays of these shapes and dtypes, norms about one and all else 0.02 times normal: nothing is left at zero.

    A block whose gates start at zero would have gradients of zero, and products of zeros draw less power, so that a
    device runs them faster. To be called under jit: drawn in their own dtype, large ones by their leading axis, since
    the bits behind a number take several times its memory (33 GB for the 8.2 GB of the denoiser, so 4.4).
    """

    def normal(leaf, key):
        if leaf.size < _DRAWN_AT_ONCE or leaf.ndim < 2:
            return jax.random.normal(key, leaf.shape, leaf.dtype)
        row = lambda key: jax.random.normal(key, leaf.shape[1:], leaf.dtype)
        return jax.lax.map(row, jax.random.split(key, leaf.shape[0]))

    def draw(path, leaf, key):
        noise = 0.02 * normal(leaf, key)
        return 1 + noise if path[-1].key == "scale" else noise

    paths, tree = jax.tree_util.tree_flatten_with_path(abstract)
    keys = jax.random.split(key, len(paths))
    return tree.unflatten([draw(path, leaf, k) for (path, leaf), k in zip(paths, keys)])


@contextlib.contextmanager
def traced(folder: str) -> Iterator[None]:
    """A profiler trace of what runs inside, written into `folder`; nothing if that is empty.

    Of what Python does only the outermost calls: a trace of the device alone stays small.
    """
    if not folder:
        yield
        return
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, 1
    with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
        yield


def machine() -> dict[str, str | int]:
    """What the figures were measured with."""
    python = ".".join(map(str, sys.version_info[:3]))
    device = jax.devices()[0].device_kind
    return {"device": device, "cores": os.cpu_count() or 0, "jax": jax.__version__, "python": python}


def rate(operations: int, seconds: float, dtype: str, executed: int | None = None) -> dict[str, float]:
    """Achieved rate, and where the device's dense bfloat16 peak is known and comparable its shares of that.

    `mfu` counts the operations of the model, `hfu` those that were `executed`, recomputation and padding included.
    """
    figures = {"operations": operations, "tflops_per_second": operations / seconds / 1e12}
    peak = flops.peak(jax.devices()[0].device_kind)
    if peak and dtype == "bfloat16":
        figures["mfu"] = operations / seconds / peak
        figures["hfu"] = (operations if executed is None else executed) / seconds / peak
    return figures


def peak_memory() -> dict[str, float]:
    """Most memory in use since the process began: of the device where it tells, of this process on a CPU."""
    statistics_ = jax.devices()[0].memory_stats()
    if statistics_ and "peak_bytes_in_use" in statistics_:
        return {"peak_device_megabytes": statistics_["peak_bytes_in_use"] / 1e6}
    return {"peak_process_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def check_positive(bench, *names: str) -> None:
    """LensError unless these fields of a benchmark's options are at least 1."""
    for name in names:
        if getattr(bench, name) < 1:
            raise LensError(f"--{name.replace('_', '-')} is {getattr(bench, name)}; it must be at least 1")


def report(bench, result: dict[str, Any]) -> dict[str, Any]:
    """A table on the console, the figures with every option as JSON where `bench.json` says; returns the figures."""
    command = "bench " + type(bench).__name__.removesuffix("Bench").lower()
    made_on = machine()
    table = Table(title=f"{command} on {made_on['device']}, {made_on['cores']} cores, jax {made_on['jax']}")
    table.show_header = False
    for name, value in result.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        shown = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if whole else str(value)
        table.add_row(name.replace("_", " "), shown)
    make_console().print(table)
    if bench.json:
        options = {name: value for name, value in dataclasses.asdict(bench).items() if name != "json"}
        text = json.dumps({**made_on, "benchmark": command, "options": options, "result": result}, indent=2)
        try:
            Path(bench.json).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise LensError(f"{bench.json}: cannot be written: {error.strerror}") from None
    return result
