"""A profile of one forward pass and one training step: the slowest kernels as figures, the traces if small enough."""

import collections
import dataclasses
import functools
import gzip
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from lens_jax.bench.denoiser import DenoiserBench, bench_denoiser
from lens_jax.bench.suite.case import Case, Setting
from lens_jax.bench.suite.kinds import check_device
from lens_jax.bench.suite.networks import TEXT_TOKENS
from lens_jax.bench.train import TrainBench, bench_train

# Of all traces together, and of one.
_MOST_BYTES = 12_000_000
# Kernels named in the results.
_SLOWEST = 12


def cases(setting: Setting) -> list[Case]:
    check_device(setting)
    tiny = setting.size == "tiny"
    options = {"size": "lens", "text_tokens": TEXT_TOKENS}
    grid = {"size": "lens", "grid": (64, 64), "batch_size": 2, "layers": 8, "text_tokens": TEXT_TOKENS}
    if tiny:
        options = {"size": "tiny", "height": 64, "width": 64, "text_tokens": 5}
        grid = {"size": "tiny", "grid": (2, 2), "batch_size": 2, "text_tokens": 3}
    forward = DenoiserBench(repeats=1, **options)
    # Few blocks: one is like another, and all of it is to be small.
    step = TrainBench(config="pretrain_512", remat="none", blocks="scanned", matrix=0, repeats=1, **grid)
    out = Path(setting.out) / "profile"
    run = lambda name, measured, bench: functools.partial(_profile, out, name, measured, bench)
    return [
        Case("forward", run("forward", bench_denoiser, forward), least=12, most=60),
        Case("train", run("train", bench_train, step), least=15, most=60),
    ]


def _profile(out: Path, name: str, measured: Callable, bench) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        measured(dataclasses.replace(bench, profile=folder))
        found = sorted(Path(folder).rglob("*"))
        traces = [path for path in found if path.name == "perfetto_trace.json.gz"]
        result = {"slowest": slowest(traces[0])} if traces else {}
        out.mkdir(parents=True, exist_ok=True)
        # A trace that opens at ui.perfetto.dev first, then what xprof reads, as far as there is room.
        kept, dropped = [], []
        wanted = {"json.gz": traces, "xplane.pb.gz": [path for path in found if path.suffix == ".pb"]}
        for suffix, path in [(suffix, path) for suffix, paths in wanted.items() for path in paths]:
            target = out / f"{name}.{suffix}"
            (kept if _keep(path, target) else dropped).append(target.name)
        files = ", ".join(kept) + (f"; too large and left out: {', '.join(dropped)}" if dropped else "")
        return {**result, "files": files}


def _keep(source: Path, target: Path) -> bool:
    """Copy a file, compressed, unless all that is there would then be too large to send."""
    temporary = target.with_name(target.name + ".tmp")
    with source.open("rb") as data, temporary.open("wb") as output:
        if source.suffix == ".gz":
            shutil.copyfileobj(data, output)
        else:
            with gzip.GzipFile(fileobj=output, mode="wb", mtime=0) as packed:
                shutil.copyfileobj(data, packed)
    target.unlink(missing_ok=True)
    if sum(path.stat().st_size for path in target.parent.iterdir()) > _MOST_BYTES:
        temporary.unlink()
        return False
    temporary.replace(target)
    return True


def slowest(trace: Path, most: int = _SLOWEST) -> list[str]:
    """The device's kernels that took longest together, "MS ms in CALLS: NAME"; empty where no device was traced."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named = [event for event in events if event.get("ph") == "M"]
    processes = {event["pid"]: event["args"]["name"] for event in named if event["name"] == "process_name"}
    rows = {(event["pid"], event["tid"]): event["args"]["name"] for event in named if event["name"] == "thread_name"}
    rows = {key: name for key, name in rows.items() if "/device:" in processes.get(key[0], "")}
    # A GPU's kernels are on its streams; other rows of the same trace tell the same again by operation and program.
    rows = {key for key, name in rows.items() if name.startswith("Stream")} or set(rows)
    seconds, calls = collections.Counter(), collections.Counter()
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event.get("tid")) in rows:
            seconds[event["name"]] += event.get("dur", 0) / 1e3
            calls[event["name"]] += 1
    return [f"{ms:.3g} ms in {calls[name]}: {name[:80]}" for name, ms in seconds.most_common(most)]
